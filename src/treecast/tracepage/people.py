"""Who proposed: every proposer of every speculator, with a name and a colour of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from treecast.wire.rounds import Round, RoundDraft

NUM_COLOURS = 8


@dataclass(frozen=True, slots=True)
class Proposer:
    """One drafter of one speculator; colours repeat after the eighth."""

    speculator: str
    name: str
    number: int

    @property
    def colour(self) -> int:
        return self.number % NUM_COLOURS


class Cast:
    """All who took part, in the order in which they appear."""

    def __init__(self, rounds: Iterable[Round]) -> None:
        keys: dict[tuple[str, str], None] = {}
        for one in rounds:
            for draft in one.drafts:
                keys |= dict.fromkeys((draft.speculator, name) for name in draft.proposers)
        self._proposers = _named(list(keys))

    @property
    def proposers(self) -> list[Proposer]:
        return list(self._proposers.values())

    def speculators(self) -> list[tuple[str, list[Proposer]]]:
        """Each with its proposers."""
        found: dict[str, list[Proposer]] = {}
        for proposer in self.proposers:
            found.setdefault(proposer.speculator, []).append(proposer)
        return list(found.items())

    def of_node(self, one: Round, node: int) -> list[Proposer]:
        """Who proposed a node, whatever the round's numbering."""
        keys = [(draft.speculator, name) for draft in one.drafts for name in draft.proposers]
        bits = one.tree.proposers[node]
        found = [self._proposers[key] for k, key in enumerate(keys) if bits >> k & 1]
        return sorted(found, key=lambda proposer: proposer.number)

    def of_draft(self, draft: RoundDraft) -> list[Proposer]:
        return [self._proposers[draft.speculator, name] for name in draft.proposers]


def _named(keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Proposer]:
    """Speculators may have drafters of one name; those are numbered."""
    total = Counter(name for _, name in keys)
    seen: Counter[str] = Counter()
    named = {}
    for number, (speculator, name) in enumerate(keys):
        seen[name] += 1
        shown = name if total[name] == 1 else f"{name} {seen[name]}"
        named[speculator, name] = Proposer(speculator, shown, number)
    return named
