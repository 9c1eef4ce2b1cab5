"""Latencies under open-loop load, by level of batching."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from treecast.bench.arrivals import LoadSummary
from treecast.bench.study.plots import COLOURS, MARKERS

_FIGURES: dict[str, Callable[[LoadSummary], Mapping[int, float]]] = {
    "first token": lambda one: one.first_token_ms,
    "last token": lambda one: one.latency_ms,
    "between tokens": lambda one: one.per_token_ms,
}


def draw_arrivals(summaries: Sequence[LoadSummary], arrivals: str, path: Path) -> None:
    """Write a PNG: a panel per latency, a line per percentile."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(_FIGURES), 3.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed
    for place, (title, read) in enumerate(_FIGURES.items(), start=1):
        axes = figure.add_subplot(1, len(_FIGURES), place)
        answered = [one for one in summaries if read(one)]
        for index, percentile in enumerate(read(answered[0]) if answered else ()):
            axes.plot(
                [one.level for one in answered],
                [read(one)[percentile] for one in answered],
                MARKERS[index] + "-",
                color=COLOURS[index],
                label=f"p{percentile}",
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(f"{title}, {arrivals} a second", fontsize="medium")
        axes.set_xlabel("requests in one step at most")
        axes.set_ylabel("ms from the planned arrival" if "between" not in title else "ms")
        axes.grid(alpha=0.3)
        if answered:
            axes.legend(fontsize="small")
    figure.savefig(path)
