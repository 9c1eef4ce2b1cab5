"""The tables, in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .audit import Holding
from .load import Outcome, Record

PAUSE_BOUND_S = 2.0


@dataclass(frozen=True, slots=True)
class Row:
    """One fault, over all streams that it overlapped.

    Attributes:
        in_flight: streams that ran when it began.
        whys: what the errors said, with how often.
    """

    fault: str
    in_flight: int
    checked: int
    lost: int
    changed: int
    errors: int
    p99_pause_s: float
    whys: Mapping[str, int]

    @property
    def holds(self) -> bool:
        """Nothing lost, changed or refused; the pause is judged apart."""
        return not (self.lost or self.changed or self.errors)

    def __str__(self) -> str:
        cells = (
            *(self.fault, self.in_flight, self.checked, self.lost, self.changed, self.errors),
            f"{self.p99_pause_s:.2f} s",
        )
        return f"| {' | '.join(map(str, cells))} |"


ROW_HEAD = (
    "| fault | streams in flight | checked | lost | changed | errors | p99 pause |\n"
    "|---|---|---|---|---|---|---|"
)


def row_of(fault: str, in_flight: int, records: Sequence[Record]) -> Row:
    outcomes = Counter(record.outcome for record in records)
    return Row(
        fault,
        in_flight,
        len(records),
        outcomes[Outcome.LOST],
        outcomes[Outcome.CHANGED],
        outcomes[Outcome.ERROR],
        percentile([record.pause_s for record in records], 99),
        Counter(record.why for record in records if record.why),
    )


def percentile(values: Iterable[float], share: float) -> float:
    """Nearest rank; 0 of nothing."""
    ordered = sorted(values)
    rank = -(-len(ordered) * share // 100)
    return ordered[int(rank) - 1] if ordered else 0.0


def stock_table(before: Mapping[str, Holding], after: Mapping[str, Holding]) -> str:
    """What each process holds when all is quiet again, beside the fresh mesh."""
    lines = ["| process | still held | file descriptors | memory |", "|---|---|---|---|"]
    for name, now in after.items():
        held = ", ".join(f"{count} {what}" for what, count in now.counts.items())
        was = before[name]
        lines.append(
            f"| {name} | {held} | {was.num_fds} -> {now.num_fds} | "
            f"{was.rss_mib:.0f} -> {now.rss_mib:.0f} MiB |"
        )
    return "\n".join(lines)
