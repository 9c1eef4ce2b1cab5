"""The report of a tuning run, for machines (JSON) and for readers (Markdown)."""

import json
from dataclasses import asdict

from treecast.tuning.settings import DraftReport, TuneReport
from treecast.tuning.whole_file import write_whole


def write_report(report: TuneReport) -> None:
    """Write report.json and report.md into the folder that it names."""
    folder = report.report
    write_whole(folder / "report.json", json.dumps(asdict(report), default=str, indent=1).encode())
    write_whole(folder / "report.md", markdown(report).encode())


def markdown(report: TuneReport) -> str:
    """The report as a page."""
    rows = [_row(draft.name, draft.heldout_success) for draft in report.drafts]
    if len(report.drafts) > 1:
        rows.append(_row("union", report.union_success))
        rows.append(_row("distinct guesses of the union", report.union_guesses, "{:.2f}"))
    if report.single:
        rows.append(_row("one draft of the same size", report.single.heldout_success))
        rows.append(
            _row("the same, with as many guesses", _at(report.single_ranks, report.union_guesses))
        )
    drafts = [*report.drafts, *([report.single] if report.single else [])]
    return "\n".join(
        [
            "# Tuned drafts",
            "",
            f"Share of {report.num_heldout_tokens} held-out tokens, greedily written by the "
            f"target in {report.num_heldout} answers, within the first 1 to 5 guesses, given the "
            f"true prefix. Corpus: {report.num_records} records.",
            "",
            "| | top 1 | top 2 | top 3 | top 4 | top 5 |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            "| draft | layers of the target | head rows | MB | steps | epochs | minutes | share "
            "left to it |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *map(_shape, drafts),
            "",
            *_verdict(report),
            "",
        ]
    )


def _verdict(report: TuneReport) -> list[str]:
    """Whether several drafts beat the single one, at equal numbers of guesses."""
    if not report.single:
        return ["No single draft of the same size was trained beside them."]
    single = _at(report.single_ranks, report.union_guesses)
    wins = sum(both > one for both, one in zip(report.union_success, single, strict=True))
    return [
        f"With equally many guesses the union is better than the single draft at {wins} of "
        f"{len(single)} widths."
    ]


def _at(ranks: tuple[float, ...], sizes: tuple[float, ...]) -> tuple[float, ...]:
    """Success with a fractional number of guesses, interpolated."""
    found = []
    for size in sizes:
        low = int(size)
        high = min(low + 1, len(ranks))
        found.append(ranks[low - 1] + (size - low) * (ranks[high - 1] - ranks[low - 1]))
    return tuple(found)


def _row(name: str, values: tuple[float, ...], shape: str = "{:.3f}") -> str:
    return f"| {name} | " + " | ".join(shape.format(value) for value in values) + " |"


def _shape(draft: DraftReport) -> str:
    return (
        f"| {draft.name} | {', '.join(map(str, draft.layers))} | {draft.head_rows} "
        f"| {draft.stored_bytes / 1e6:.1f} | {draft.num_steps} | {draft.num_epochs} "
        f"| {draft.elapsed_s / 60:.1f} | {draft.train_share:.2f} |"
    )
