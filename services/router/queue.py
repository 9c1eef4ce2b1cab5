"""The bounded queue of requests that wait for a verifier."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator
from typing import Generic, TypeVar

from treecast.errors import Overloaded

T = TypeVar("T")

_AHEAD = float("-inf")


class WaitingQueue(Generic[T]):
    """Items by priority, first come first served among equals. Not thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._arrivals = itertools.count()
        self._order: list[tuple[float, int]] = []
        self._items: dict[tuple[float, int], T] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[T]:
        """In the order in which they should be served; safe against changes meanwhile."""
        return iter([self._items[rank] for rank in self._order])

    def join(self, item: T, priority: int) -> None:
        """Add behind all of the same or a higher priority.

        Raises:
            Overloaded: the queue is full.
        """
        if len(self._order) >= self._limit:
            raise Overloaded(f"queue has {len(self._order)} requests; the limit is {self._limit}")
        self._add(item, -priority)

    def rejoin(self, item: T) -> None:
        """Add an item that was served before: ahead of all newcomers, and whatever the limit."""
        self._add(item, _AHEAD)

    def leave(self, item: T) -> None:
        """Take an item out. Safe to repeat."""
        for rank, waiting in self._items.items():
            if waiting is item:
                del self._items[rank]
                del self._order[bisect.bisect_left(self._order, rank)]
                return

    def _add(self, item: T, rank: float) -> None:
        key = (rank, next(self._arrivals))
        bisect.insort(self._order, key)
        self._items[key] = item
