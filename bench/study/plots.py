"""The report's plots, one per section; the only module that knows matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from treecast.errors import InvalidRequest

from .folder import Finding
from .results import NUM_GUESSES, Estimate, Reliability, StepTime
from .sections import Section
from .tables import (
    by_setting,
    decodings,
    guess_series,
    rate,
    shares,
    step_rates,
    success,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Told apart without red and green. Source: Okabe and Ito 2008, "Color universal design"."""
MARKERS = "osD^vPX*"
_PANEL_INCHES = (4.4, 3.4)
_DPI = 100


def check_matplotlib() -> None:
    """Find out before measuring whether there can be plots.

    Raises:
        InvalidRequest: matplotlib is missing; says how to get it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InvalidRequest(
            "plots are drawn with matplotlib, which is not installed; "
            "run `pip install 'treecast[bench]'`"
        ) from error


def draw(findings: Sequence[Finding], folder: Path) -> dict[Section, str]:
    """Write a PNG for each section; returns their names."""
    return {found.section: _draw(found, folder) for found in findings}


def _draw(found: Finding, folder: Path) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _PANELS[found.section](found)
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * len(panels), height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed
    for place, (title, paint) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place)
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
        paint(axes)
    name = f"{found.section.value}.png"
    figure.savefig(folder / name)
    return name


Paint = Callable[["Axes"], None]


def _success(found: Finding) -> dict[str, Paint]:
    series = guess_series(found.measured.guesses)

    def panel(setting: str) -> Paint:
        def paint(axes: Axes) -> None:
            own = [(proposer, some) for (name, proposer), some in series.items() if name == setting]
            for index, (proposer, some) in enumerate(own):
                _line(axes, range(1, NUM_GUESSES + 1), success(some), proposer, index)
            axes.set_xticks(range(1, NUM_GUESSES + 1))
            _label(axes, "guesses k", "share of tokens within the first k")
            axes.set_ylim(0, 1)

        return paint

    return {setting: panel(setting) for setting in dict.fromkeys(name for name, _ in series)}


def _width(found: Finding) -> dict[str, Paint]:
    trials = found.measured.trials

    def panel(decoding: str) -> Paint:
        def paint(axes: Axes) -> None:
            own = by_setting(trials, decoding)
            for index, family in enumerate(("<1,1,k,1,1,1,1,1>", "<k,1,1,1,1,1,1,1>")):
                named = {k: family.replace("k", str(k)) for k in range(1, NUM_GUESSES + 1)}
                known = {k: own[name] for k, name in named.items() if name in own}
                _line(axes, known, [rate(some) for some in known.values()], family, index)
            axes.set_xticks(range(1, NUM_GUESSES + 1))
            _label(axes, "tree width k", "tokens per step")

        return paint

    return {decoding: panel(decoding) for decoding in decodings(trials)}


def _laws(found: Finding) -> dict[str, Paint]:
    def paint(axes: Axes) -> None:
        own = by_setting(found.measured.trials, "stochastic")
        for index, (setting, trials) in enumerate(own.items()):
            accepted = Estimate.of([trial.tokens_per_step - 1 for trial in trials])
            colour = COLOURS[0] if setting.startswith("replay") else COLOURS[1]
            axes.barh(index, accepted.mean, xerr=accepted.error, color=colour, capsize=3)
        axes.set_yticks(range(len(own)), list(own))
        axes.invert_yaxis()
        axes.set_xlabel("nodes accepted per step")

    return {"temperature 1": paint}


def _length(found: Finding) -> dict[str, Paint]:
    trials = found.measured.trials

    def lengths(axes: Axes) -> None:
        names = decodings(trials)
        for index, name in enumerate(names):
            own = shares([trial for trial in trials if trial.decoding == name])
            places = [length + 0.4 * index - 0.2 for length in range(len(own))]
            heights, errors = [each.mean for each in own], [each.error or 0 for each in own]
            axes.bar(places, heights, 0.4, yerr=errors, color=COLOURS[index], label=name)
        _label(axes, "nodes accepted in a step", "share of steps")

    def categories(axes: Axes) -> None:
        names = list(dict.fromkeys(trial.category for trial in trials))
        for index, decoding in enumerate(decodings(trials)):
            for place, name in enumerate(names):
                own = [t for t in trials if (t.decoding, t.category) == (decoding, name)]
                each = rate(own)
                axes.errorbar(
                    each.mean,
                    place + 0.2 * index - 0.1,
                    xerr=each.error,
                    fmt=MARKERS[index],
                    color=COLOURS[index],
                    capsize=2,
                    label=None if place else decoding,
                )
        axes.set_yticks(range(len(names)), names, fontsize="small")
        axes.invert_yaxis()
        axes.set_xlabel("tokens per step")
        axes.legend(fontsize="small")

    return {"accepted length": lengths, "by category": categories}


def _time(found: Finding) -> dict[str, Paint]:
    times = found.measured.times

    def paint(axes: Axes) -> None:
        for index, batch in enumerate(dict.fromkeys(time.batch for time in times)):
            own = [time for time in times if time.batch == batch]
            _times(axes, [time.rows for time in own], own, f"requests: {batch}", index)
        _label(axes, "rows of each request", "step (ms)")
        axes.set_ylim(bottom=0)

    return {"step time of this machine": paint}


def _shape(found: Finding) -> dict[str, Paint]:
    rates = step_rates(found.measured.trials)
    times = found.measured.times

    def steps(axes: Axes) -> None:
        for index, name in enumerate(rates):
            own = [time for time in times if time.setting == name]
            _times(axes, [time.batch for time in own], own, name, index)
        _label(axes, "requests", "step (ms)")
        axes.set_ylim(bottom=0)

    def tokens(axes: Axes) -> None:
        for index, (name, each) in enumerate(rates.items()):
            own = [time for time in times if time.setting == name]
            per_s = [1e3 * time.batch * each.mean / time.median_ms for time in own]
            axes.plot(
                [time.batch for time in own],
                per_s,
                MARKERS[index] + "-",
                color=COLOURS[index],
                label=name,
            )
        _label(axes, "requests", "tokens/s, drafting not counted")
        axes.set_ylim(bottom=0)

    return {"step time of this machine": steps, "throughput of this machine": tokens}


def _calibration(found: Finding) -> dict[str, Paint]:
    rows = found.measured.reliability

    def panel(decoding: str) -> Paint:
        def paint(axes: Axes) -> None:
            own = [row for row in rows if row.decoding == decoding]
            axes.plot([0, 1], [0, 1], "--", color="#999999", label="as predicted")
            for index, names in enumerate(dict.fromkeys(row.proposers for row in own)):
                mine = [row for row in own if row.proposers == names]
                _reliable(axes, mine, names, index)
            _label(axes, "predicted (dotted: calibrated)", "share accepted")

        return paint

    return {name: panel(name) for name in dict.fromkeys(row.decoding for row in rows)}


def _reliable(axes: Axes, rows: Sequence[Reliability], label: str, index: int) -> None:
    """Observed over predicted, with one standard error of a share; dotted over calibrated."""
    seen = [row.accepted for row in rows]
    errors = [(row.accepted * (1 - row.accepted) / row.tried) ** 0.5 for row in rows]
    drafted, calibrated = [row.predicted for row in rows], [row.calibrated for row in rows]
    colour, marker = COLOURS[index % 8], MARKERS[index % 8]
    axes.errorbar(drafted, seen, errors, color=colour, marker=marker, capsize=2, label=label)
    axes.plot(calibrated, seen, marker + ":", color=colour, fillstyle="none")


def _line(
    axes: Axes, places: Iterable[int], estimates: Sequence[Estimate], label: str, index: int
) -> None:
    means, errors = [each.mean for each in estimates], [each.error or 0 for each in estimates]
    colour, marker = COLOURS[index % 8], MARKERS[index % 8]
    axes.errorbar(list(places), means, errors, color=colour, marker=marker, capsize=2, label=label)


def _times(
    axes: Axes, places: Sequence[int], times: Sequence[StepTime], label: str, index: int
) -> None:
    """Medians with their quartiles."""
    medians = [time.median_ms for time in times]
    below = [time.median_ms - time.lower_ms for time in times]
    above = [time.upper_ms - time.median_ms for time in times]
    colour, marker = COLOURS[index % 8], MARKERS[index % 8]
    axes.errorbar(
        places, medians, [below, above], color=colour, marker=marker, capsize=2, label=label
    )


def _label(axes: Axes, across: str, up: str) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.legend(fontsize="small")


_PANELS: dict[Section, Callable[[Finding], dict[str, Paint]]] = {
    Section.SUCCESS: _success,
    Section.WIDTH: _width,
    Section.LAWS: _laws,
    Section.LENGTH: _length,
    Section.TIME: _time,
    Section.SHAPE: _shape,
    Section.CALIBRATION: _calibration,
}
