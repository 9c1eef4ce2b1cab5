"""One dashboard as one picture: its rows and panels, in Grafana's order."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, MaxNLocator, MultipleLocator
from PIL import Image

from .panels import Dashboard, Heatmap, Panel, Query, Row, Unit
from .prometheus import Series
from .recording import Recording

_WIDTH_IN, _HEIGHT_IN = 13.5, 2.55
_TITLE_IN, _ROW_IN = 0.75, 0.42
_INK, _FAINT, _GROUND, _CARD = "#24292f", "#8b949e", "#f4f5f5", "#ffffff"
_COLOURS = (
    "#3274d9", "#e0752d", "#37872d", "#a352cc", "#c4162a", "#0aa2a2",
    "#b8860b", "#7d8490", "#ff7eb6", "#6c8f00", "#1f4e9c", "#8f3b1b",
)  # fmt: skip
_HEAT = LinearSegmentedColormap.from_list("heat", ("#dbe9fb", "#3274d9", "#0b1f4b"))
_MAX_LEGEND = 10
_CHARACTER_PX = 5.2


def draw(dashboard: Dashboard, recording: Recording, path: Path) -> None:
    """Write a PNG of at most 256 colours."""
    heights = [math.ceil(len(row.panels) / row.abreast) * _HEIGHT_IN for row in dashboard.rows]
    height = _TITLE_IN + sum(heights) + _ROW_IN * len(heights)
    figure = Figure(figsize=(_WIDTH_IN, height), facecolor=_GROUND)
    FigureCanvasAgg(figure)
    y = height - _TITLE_IN
    figure.text(0.012, (y + 0.4) / height, dashboard.title, size=15, weight="bold", color=_INK)
    minutes = (recording.end_s - recording.start_s) / 60
    about = f"{dashboard.description} Prometheus data of a run of {minutes:.1f} minutes."
    figure.text(0.012, (y + 0.14) / height, about, size=9, color=_FAINT)
    for row, row_height in zip(dashboard.rows, heights, strict=True):
        figure.text(0.012, (y - 0.3) / height, row.title, size=11, weight="bold", color=_INK)
        y -= _ROW_IN
        _draw_row(figure, row, y, height, recording)
        y -= row_height
    _save(figure, path)


def _draw_row(figure: Figure, row: Row, top: float, height: float, recording: Recording) -> None:
    """`top` and `height`, of the figure, in inches."""
    width = _WIDTH_IN / row.abreast
    for place, panel in enumerate(row.panels):
        left = place % row.abreast * width
        bottom = top - (place // row.abreast + 1) * _HEIGHT_IN
        card = (left + 0.06, bottom + 0.06, width - 0.12, _HEIGHT_IN - 0.12)
        _draw_card(figure, card, height)
        inner = (left + 0.62, bottom + 0.62, width - 0.85, _HEIGHT_IN - 1.06)
        axes = figure.add_axes(_fractions(inner, height))
        _draw_panel(axes, panel, recording)
        title = (left + 0.16) / _WIDTH_IN, (bottom + _HEIGHT_IN - 0.28) / height
        figure.text(*title, panel.title, size=9, weight="bold", color=_INK)


def _fractions(
    box: tuple[float, float, float, float], height: float
) -> tuple[float, float, float, float]:
    left, bottom, wide, high = box
    return left / _WIDTH_IN, bottom / height, wide / _WIDTH_IN, high / height


def _draw_card(figure: Figure, box: tuple[float, float, float, float], height: float) -> None:
    card = figure.add_axes(_fractions(box, height))
    card.set_facecolor(_CARD)
    card.set_xticks([])
    card.set_yticks([])
    for spine in card.spines.values():
        spine.set_color("#d8dbe0")


def _draw_panel(axes: Axes, panel: Panel | Heatmap, recording: Recording) -> None:
    axes.tick_params(labelsize=7, colors=_FAINT, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlim(0, recording.end_s - recording.start_s)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 1.5, 3, 6, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t // 60:.0f}:{t % 60:02.0f}"))
    if isinstance(panel, Heatmap):
        _draw_heatmap(axes, panel, recording)
    else:
        _draw_lines(axes, panel, recording)


def _draw_lines(axes: Axes, panel: Panel, recording: Recording) -> None:
    axes.grid(axis="y", color="#eceef0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value, panel.unit)))
    below = np.zeros(0)
    for place, (name, times, values) in enumerate(_lines(panel, recording)):
        colour = _COLOURS[place % len(_COLOURS)]
        if panel.stack:
            below = below if place else np.zeros(values.size)
            values = below + np.nan_to_num(values)
            axes.fill_between(times, below, values, color=colour, alpha=0.45, linewidth=0)
            below = values
        axes.plot(times, values, color=colour, linewidth=1.3, label=name)
    top = max((np.nanmax(line.get_ydata()) for line in axes.lines), default=0.0)
    axes.set_ylim(0, 1.08 * top or 1)
    axes.yaxis.set_major_locator(_locator(panel.unit, top))
    _draw_legend(axes)


def _lines(panel: Panel, recording: Recording) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Names, times and values; a query's series by name."""
    named = [
        (legend(query, series), series)
        for query in panel.queries
        for series in sorted(
            recording.answers[query.expr], key=lambda one: _natural(legend(query, one))
        )
        if any(math.isfinite(value) for value in series.values)
    ]
    times, values = _points([series for _, series in named], recording)
    for (name, _), row in zip(named, values, strict=True):
        yield name, times, row


def _locator(unit: Unit, top: float) -> Locator:
    if unit == "bytes" and top:
        return MultipleLocator(2.0 ** round(math.log2(top / 3)))
    return MaxNLocator(4)


def _draw_legend(axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    if len(names) > _MAX_LEGEND:
        handles, names = handles[:_MAX_LEGEND], [*names[: _MAX_LEGEND - 1], "and more"]
    longest_px = _CHARACTER_PX * (5 + max(map(len, names), default=0))
    axes.legend(
        handles,
        names,
        loc="upper left",
        bbox_to_anchor=(-0.16, -0.13),
        ncols=max(1, round(axes.bbox.width / longest_px)),
        fontsize=6.5,
        labelcolor=_INK,
        frameon=False,
        handlelength=1.0,
        handletextpad=0.4,
        columnspacing=1.0,
    )


def _draw_heatmap(axes: Axes, panel: Heatmap, recording: Recording) -> None:
    """Rows are buckets, equally high, without the empty ones at both ends."""
    found = sorted(recording.answers[panel.query.expr], key=_bound)
    times, values = _points(found, recording)
    counts = np.diff(np.nan_to_num(values), axis=0, prepend=0)
    used = np.flatnonzero(counts.max(axis=1) > 0)
    rows = slice(used[0], used[-1] + 1) if used.size else slice(0, len(found))
    shown = np.ma.masked_less_equal(counts[rows], 0)
    edges = np.append(times, 2 * times[-1] - times[-2])
    axes.pcolormesh(edges, np.arange(len(shown) + 1), shown, cmap=_HEAT, linewidth=0)
    _name_buckets(axes, panel.unit, [_bound(series) for series in found[rows]])


def _name_buckets(axes: Axes, unit: Unit, bounds: Sequence[float]) -> None:
    """Every row, or every second and so on, by its upper bound."""
    ticks = range(0, len(bounds), math.ceil(len(bounds) / 7))
    names = ["more" if math.isinf(bound) else amount(bound, unit) for bound in bounds]
    axes.set_yticks([tick + 0.5 for tick in ticks], [names[tick] for tick in ticks])


def _bound(series: Series) -> float:
    return float(series.labels["le"])


def _points(found: Sequence[Series], recording: Recording) -> tuple[np.ndarray, np.ndarray]:
    """Seconds from the start, [points], and values, [series, points], NaN for none."""
    times = sorted({time for series in found for time in series.times})
    place = {time: column for column, time in enumerate(times)}
    values = np.full((len(found), len(times)), np.nan)
    for row, series in zip(values, found, strict=True):
        row[[place[time] for time in series.times]] = series.values
    return np.array(times) - recording.start_s, values


def legend(query: Query, series: Series) -> str:
    """A series' name: the query's legend with {{label}} filled in."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: series.labels.get(found[1], ""), query.legend)


def amount(value: float, unit: Unit) -> str:
    """A number as an axis shows it."""
    if unit == "percentunit":
        return f"{100 * value:.3g}%"
    steps: Sequence[tuple[float, str]] = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
    if unit == "s":
        steps = ((1, " s"), (1e-3, " ms"), (1e-6, " µs"))
    if unit == "bytes":
        steps = ((2**30, " GiB"), (2**20, " MiB"), (2**10, " KiB"), (1, " B"))
    if value == 0:
        return "0"
    factor, name = next((one for one in steps if abs(value) >= one[0]), steps[-1])
    return f"{value / factor:.3g}{name}"


def _natural(name: str) -> list[tuple[int, float, str]]:
    """So that depth 2 comes before depth 10."""
    parts = re.findall(r"-?\d+\.?\d*|[^\d-]+|-", name)
    return [(0, float(part), "") if part[-1].isdigit() else (1, 0.0, part) for part in parts]


def _save(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100, facecolor=_GROUND)
    picture.seek(0)
    with Image.open(picture) as image:
        few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        few.save(path, optimize=True)
