"""The report as Markdown: of each section its definition in one line, its table, and its plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np

from treecast.drafting.growth.optimal import OptimalTrees, Size
from treecast.tree import MAX_DEPTH

from .folder import Finding, Origin
from .results import NUM_GUESSES, Estimate, Guesses, Reliability, StepTime, Trial
from .sections import Section

PAIRED_WITH = "replay / coupled"
Rows = Sequence[Sequence[object]]


def markdown(findings: Sequence[Finding], plots: Mapping[Section, str]) -> str:
    """The page; `plots` are file names beside it."""
    lines = ["# Trees: what they are worth", "", *_origins(findings)]
    for found in findings:
        lines += ["", f"## {_TITLES[found.section]}", "", _DEFINITIONS[found.section], ""]
        lines += _TABLES[found.section](found)
        if found.section in plots:
            lines += ["", f"![{_TITLES[found.section]}]({plots[found.section]})"]
    return "\n".join([*lines, ""])


def _origins(findings: Sequence[Finding]) -> Iterator[str]:
    """Machine, versions, settings and command; once, unless sections were measured apart."""
    yield (
        "Figures are means over prompts, ± one standard error over prompts where there are two or "
        "more. Times are of this machine alone."
    )
    for _, group in groupby(findings, key=lambda found: _identity(found.origin)):
        some = list(group)
        origin = some[0].origin
        names = ", ".join(f"{found.section.value} {found.origin.seconds:.0f} s" for found in some)
        yield ""
        yield from table(
            ["", ""],
            [
                ["machine", _listed(origin.machine)],
                ["versions", _listed(origin.versions)],
                ["settings", _listed(origin.settings)],
                ["command", f"`{origin.command}`"],
                ["sections", names],
            ],
        )


def _identity(origin: Origin) -> tuple[str, ...]:
    return repr(origin.machine), repr(origin.versions), repr(origin.settings), origin.command


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(
        f"{name} {'+'.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for name, value in values.items()
    )


def table(head: Sequence[str], rows: Rows) -> list[str]:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def by_setting(rows: Sequence[Trial], decoding: str) -> dict[str, list[Trial]]:
    """One decoding's trials by setting, in the order in which they were measured."""
    found: dict[str, list[Trial]] = {}
    for row in rows:
        if row.decoding == decoding:
            found.setdefault(row.setting, []).append(row)
    return found


def rate(trials: Sequence[Trial]) -> Estimate:
    """Tokens per step, over prompts."""
    return Estimate.of([trial.tokens_per_step for trial in trials])


def decodings(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(trial.decoding for trial in trials))


def guess_series(rows: Sequence[Guesses]) -> dict[tuple[str, str], list[Guesses]]:
    """Rows by setting and proposer."""
    found: dict[tuple[str, str], list[Guesses]] = {}
    for row in rows:
        found.setdefault((row.setting, row.proposer), []).append(row)
    return found


def success(rows: Sequence[Guesses]) -> list[Estimate]:
    """Rate of success within the first 1 to 5 guesses."""
    counts = range(1, NUM_GUESSES + 1)
    return [Estimate.of([row.rate(count) for row in rows]) for count in counts]


def best_tokens(row: Guesses, max_nodes: int) -> float:
    """Tokens per step of the best tree for one answer, if at every node its guesses were worth what
    they were on average (Sequoia, section 3.1).
    """
    counts = range(1, NUM_GUESSES + 1)
    sizes = [0.0, *(row.size(count) for count in counts)]
    hits = [0.0, *(row.rate(count) for count in counts)]
    reached = np.interp(np.arange(math.ceil(sizes[-1]) + 1), sizes, hits)
    trees = OptimalTrees(np.diff(reached).tolist(), Size(max_nodes, min(max_nodes, MAX_DEPTH)))
    return 1 + float(trees.expected_tokens[-1, -1])


def _success(found: Finding) -> list[str]:
    rows: list[list[object]] = []
    for (setting, proposer), some in guess_series(found.measured.guesses).items():
        rows.append([setting, proposer, *success(some)])
        if proposer == "union":
            sizes = (Estimate.of([row.size(k) for row in some]) for k in range(1, NUM_GUESSES + 1))
            rows.append([setting, "distinct guesses of the union", *sizes])
    max_nodes = int(found.origin.settings["max_nodes"])
    return [
        *table(["decoding", "proposer", *(f"top {k}" for k in range(1, NUM_GUESSES + 1))], rows),
        "",
        f"Tokens per step of the best tree of {max_nodes} nodes, if all proposers' guesses were "
        "worth at every node what they were at an answer's tokens on average:",
        "",
        *_optimum(found.measured.guesses, max_nodes),
    ]


def _optimum(rows: Sequence[Guesses], max_nodes: int) -> list[str]:
    """By category, of all proposers together."""
    together = rows[-1].proposer  # the union, where there are several
    best: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.proposer == together:
            found = best_tokens(row, max_nodes)
            for category in (row.category, "all prompts"):
                best.setdefault(category, {}).setdefault(row.setting, []).append(found)
    overall = best.pop("all prompts")
    lines = [
        [category, *(Estimate.of(own[setting]) for setting in overall)]
        for category, own in (*best.items(), ("all prompts", overall))
    ]
    return table(["category", *overall], lines)


def _width(found: Finding) -> list[str]:
    trials = found.measured.trials
    names = decodings(trials)
    columns = [by_setting(trials, name) for name in names]
    return table(
        ["expansion", *names],
        [[f"`{setting}`", *(rate(own[setting]) for own in columns)] for setting in columns[0]],
    )


def _laws(found: Finding) -> list[str]:
    by_law = by_setting(found.measured.trials, "stochastic")
    base = by_law[PAIRED_WITH]
    rows = []
    for setting, trials in by_law.items():
        gains = [mine.tokens_per_step - of.tokens_per_step for mine, of in _pairs(trials, base)]
        nodes = sum(trial.nodes for trial in trials) / sum(trial.steps for trial in trials)
        accepted = Estimate.of([trial.tokens_per_step - 1 for trial in trials])
        paired = "" if trials is base else Estimate.of(gains)
        rows.append([setting, accepted, rate(trials), paired, f"{nodes:.1f}"])
    head = ["law / proposal", "accepted per step", "tokens per step", f"minus {PAIRED_WITH}"]
    return table([*head, "nodes per step"], rows)


def _pairs(trials: Sequence[Trial], base: Sequence[Trial]) -> Iterator[tuple[Trial, Trial]]:
    by_question = {trial.question: trial for trial in base}
    return ((trial, by_question[trial.question]) for trial in trials)


def shares(trials: Sequence[Trial]) -> list[Estimate]:
    """Element d: share of steps that accept d nodes, over prompts."""
    deepest = max(len(trial.steps_by_accepted) for trial in trials)
    return [
        Estimate.of([_count(trial, length) / trial.steps for trial in trials])
        for length in range(deepest)
    ]


def _count(trial: Trial, length: int) -> int:
    counts = trial.steps_by_accepted
    return counts[length] if length < len(counts) else 0


def _length(found: Finding) -> list[str]:
    trials = found.measured.trials
    names = decodings(trials)
    own = {name: [trial for trial in trials if trial.decoding == name] for name in names}
    columns = [shares(own[name]) for name in names]
    deepest = max(map(len, columns))
    lengths = [
        [length, *(column[length] if length < len(column) else "0" for column in columns)]
        for length in range(deepest)
    ]
    categories: list[list[object]] = [
        [name, *_per_category(own, names, name)]
        for name in dict.fromkeys(trial.category for trial in trials)
    ]
    categories.append(["all prompts", len(own[names[0]]), *(rate(own[name]) for name in names)])
    categories.append(["all steps", "", *(f"{_overall(own[name]):.2f}" for name in names)])
    return [
        *table(["nodes accepted", *(f"share of steps, {name}" for name in names)], lengths),
        "",
        "Tokens per step by category:",
        "",
        *table(["category", "prompts", *names], categories),
    ]


def _per_category(
    own: Mapping[str, Sequence[Trial]], names: Sequence[str], category: str
) -> Iterator[object]:
    groups = [[trial for trial in own[name] if trial.category == category] for name in names]
    yield len(groups[0])
    yield from map(rate, groups)


def _overall(trials: Sequence[Trial]) -> float:
    """All tokens by all steps, so that long answers weigh more."""
    return sum(trial.tokens for trial in trials) / sum(trial.steps for trial in trials)


def _time(found: Finding) -> list[str]:
    times = found.measured.times
    batches = list(dict.fromkeys(time.batch for time in times))
    cells = {(time.setting, time.batch): _ms(time) for time in times}
    rows = [
        [f"`{name}`" if name.startswith("<") else name, rows]
        + [cells[name, batch] for batch in batches]
        for name, rows in dict.fromkeys((time.setting, time.rows) for time in times)
    ]
    return table(["tree", "rows of each", *(_requests(batch) for batch in batches)], rows)


def _requests(batch: int) -> str:
    return "1 request" if batch == 1 else f"{batch} requests"


def _ms(time: StepTime) -> str:
    return f"{time.median_ms:.1f} ({time.lower_ms:.1f}-{time.upper_ms:.1f})"


def step_rates(trials: Sequence[Trial]) -> dict[str, Estimate]:
    """Tokens per step by way of decoding; sequences hold what the tree holds, plain decoding 1."""
    measured = {name: rate(some) for name, some in by_setting(trials, "greedy").items()}
    plain = Estimate(1.0, None, measured["tree"].count)
    return {"plain": plain, **measured, "sequences": measured["tree"]}


def _shape(found: Finding) -> list[str]:
    rates = step_rates(found.measured.trials)
    rows = [
        [
            time.setting,
            time.batch,
            time.batch * time.rows,
            _ms(time),
            rates[time.setting],
            f"{time.median_ms / rates[time.setting].mean / time.batch:.1f}",
        ]
        for time in found.measured.times
    ]
    head = ["way", "requests", "rows", "step, ms", "tokens per step", "ms per token"]
    return table(head, rows)


def _calibration(found: Finding) -> list[str]:
    def row(one: Reliability) -> list[object]:
        shares = (f"{x:.3f}" for x in (one.predicted, one.calibrated, one.accepted))
        return [one.decoding, one.proposers, one.tried, *shares]

    head = ["decoding", "proposers", "nodes tried", "as drafted", "calibrated", "accepted"]
    return table(head, [row(one) for one in found.measured.reliability])


_TITLES = {
    Section.SUCCESS: "Success by number of guesses",
    Section.WIDTH: "Tokens per step by tree width",
    Section.LAWS: "Laws and proposals",
    Section.LENGTH: "Accepted length",
    Section.TIME: "Step time by width and batch",
    Section.SHAPE: "Tree, chain and sequences",
    Section.CALIBRATION: "Predicted against observed acceptance",
}

_DEFINITIONS = {
    Section.SUCCESS: (
        "Share of an answer's tokens within the first k guesses given the true text before them "
        "(SpecInfer, table 1); stochastic at temperature 1, guesses coupled to the target's noise "
        "or the draft's likeliest; a union's k are of each proposer."
    ),
    Section.WIDTH: (
        "Tokens per step of the draft models alone, every node of an expansion vector of width k "
        "verified (SpecInfer, table 2): `<1,1,k,1,1,1,1,1>` widens the paper's vector where it "
        "branches, `<k,1,1,1,1,1,1,1>` at the root; proposals are coupled, stochastic is "
        "temperature 1."
    ),
    Section.LAWS: (
        "Nodes accepted per step at temperature 1 by law and proposal (SpecInfer, table 3; its "
        "naive sampling is replay / topk), draft models alone, trees `<3,2,1,1>`; differences are "
        "paired by prompt."
    ),
    Section.LENGTH: (
        "Share of steps by number of nodes accepted, trees as served by all drafters (SpecInfer, "
        "figure 9), and tokens per step by category of prompt."
    ),
    Section.TIME: (
        "Milliseconds of one pass of the target over full trees, 192 tokens of context each, "
        "median (quartiles) of interleaved passes (SpecInfer, figure 10); drafting not counted."
    ),
    Section.SHAPE: (
        "Verifying `<1,1,3,1,1,1,1,1>` as one tree, the same as a sequence per leaf, and a chain "
        "of 8 (SpecInfer, figure 11), greedy, draft models alone; a step is one pass of the target "
        "at 192 tokens of context, drafting not counted."
    ),
    Section.CALIBRATION: (
        "Of nodes whose parent was reached: mean confidence as drafted, what the verifier's online "
        "calibration made of it beforehand, and the share accepted, by the proposers that agreed "
        "and by bin of confidence; trees as served."
    ),
}

_TABLES: dict[Section, Callable[[Finding], list[str]]] = {
    Section.SUCCESS: _success,
    Section.WIDTH: _width,
    Section.LAWS: _laws,
    Section.LENGTH: _length,
    Section.TIME: _time,
    Section.SHAPE: _shape,
    Section.CALIBRATION: _calibration,
}
