"""The sum of all rounds: tokens per step, and who was right how often, how deep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from treecast.wire.rounds import Round

from .people import Cast


@dataclass(frozen=True, slots=True)
class Rate:
    """`hits` of `total`."""

    name: str
    hits: int
    total: int
    colour: int = -1

    @property
    def percent(self) -> float:
        return 100 * self.hits / max(1, self.total)


@dataclass(frozen=True, slots=True)
class Summary:
    """Attributes:
    by_depth: trees whose accepted path came to that depth, of those that had nodes there.
    by_proposer: nodes accepted, of those that it proposed and that were verified.
    """

    num_tokens: int
    num_rounds: int
    num_verified: int
    num_accepted: int
    by_depth: tuple[Rate, ...]
    by_proposer: tuple[Rate, ...]

    @property
    def tokens_per_round(self) -> float:
        return self.num_tokens / max(1, self.num_rounds)


def summarise(rounds: Sequence[Round], cast: Cast) -> Summary:
    return Summary(
        num_tokens=sum(len(one.tokens) for one in rounds),
        num_rounds=len(rounds),
        num_verified=sum(len(one.tree) for one in rounds),
        num_accepted=sum(len(one.accepted) for one in rounds),
        by_depth=_by_depth(rounds),
        by_proposer=_by_proposer(rounds, cast),
    )


def _by_depth(rounds: Sequence[Round]) -> tuple[Rate, ...]:
    reached = Counter(d for one in rounds for d in range(1, max(one.tree.depths, default=0) + 1))
    hits = Counter(depth for one in rounds for depth in range(1, len(one.accepted) + 1))
    return tuple(Rate(f"{depth}", hits[depth], reached[depth]) for depth in sorted(reached))


def _by_proposer(rounds: Sequence[Round], cast: Cast) -> tuple[Rate, ...]:
    verified: Counter[int] = Counter()
    accepted: Counter[int] = Counter()
    for one in rounds:
        for node in range(len(one.tree)):
            numbers = [proposer.number for proposer in cast.of_node(one, node)]
            verified.update(numbers)
            accepted.update(numbers if node in one.accepted else ())
    return tuple(
        Rate(each.name, accepted[each.number], verified[each.number], each.colour)
        for each in cast.proposers
    )
