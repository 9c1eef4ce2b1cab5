"""Whose turn it is where: what the dispatcher decides, apart from its waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol, TypeVar

from .placement import Candidate, Placement, Wanted, keep_free, place


class Waiting(Protocol):
    """Something that waits for a verifier."""

    @property
    def wanted(self) -> Wanted: ...


W = TypeVar("W", bound=Waiting)


def turns(
    waiting: Iterable[W], candidates: Callable[[], Sequence[Candidate]]
) -> Iterator[tuple[W, Placement | None]]:
    """Everybody who waits, in the queue's order, and where each is to be seated now, if anywhere.

    One that cannot be seated keeps a verifier free of those behind it; see `keep_free`.

    Args:
        candidates: the verifiers as they are now. Whoever is told a placement seats it before it
            asks for the next turn.
    """
    kept: set[str | None] = set()
    now = candidates()
    left = _less(now, kept)
    for one in waiting:
        placement = place(left, one.wanted)
        yield one, placement
        if placement is not None:
            now = candidates()
            left = _less(now, kept)
        elif left:
            kept.add(keep_free(left, one.wanted))
            left = _less(now, kept)


def _less(candidates: Sequence[Candidate], kept: AbstractSet[str | None]) -> Sequence[Candidate]:
    """Those not kept; nobody once all are full, so that the rest of a queue costs nothing."""
    left = [one for one in candidates if one.instance_id not in kept]
    return left if any(one.trusted and one.free > 0 for one in left) else ()
