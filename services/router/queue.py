"""The bounded queue of requests that wait for a verifier: by priority, fair between tenants."""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from treecast.errors import Overloaded

T = TypeVar("T")

QueueOrder = Literal["fcfs", "shortest"]
"""Within one tenant's line: first come first served, or the shortest first as far as age allows."""


@dataclass(frozen=True, slots=True)
class Share:
    """Whose turn a request takes, and how much of it.

    Attributes:
        priority: the higher goes first, whoever asks.
        cost: tokens that it may take, prompt and output.
        rank: in its tenant's line of its priority the lowest goes first; see `rank_of`.
    """

    tenant: str
    priority: int = 0
    cost: int = 1
    rank: float = 0.0


def rank_of(order: QueueOrder, now_s: float, left_tokens: int | None, give_way_s: float) -> float:
    """A request's rank: when it came, and as much later as it is expected to be long.

    Shortest first with aging: a request goes ahead of one that came earlier if it is shorter by
    enough tokens for the time between them. So nobody is passed by one that came more than
    `left_tokens * give_way_s` later, whatever else comes: no request starves. Ranks never change,
    which a line is kept in order by.

    Args:
        left_tokens: output expected from now on; None for no idea, which counts as none to come.
        give_way_s: how much later another may come and still go first, for each token by which it
            is shorter.
    """
    return now_s if order == "fcfs" else now_s + (left_tokens or 0) * give_way_s


@dataclass(frozen=True, slots=True, order=True)
class Place(Generic[T]):
    """A place in a tenant's line: by rank, then first come first served."""

    rank: float
    number: int
    item: T = field(compare=False)
    cost: int = field(compare=False)


@dataclass(slots=True)
class Level(Generic[T]):
    """Those of one priority: a queue per tenant, and the tokens that each has been served.

    The tenant served least goes first, and is charged what it takes. That is deficit round robin
    with the quantum taken to 0: no tenant is ahead of another that waits by more than one request,
    whatever sizes they ask for. One that comes back is level with the least served of those that
    wait: nobody saves up for later by not asking, nor pays for having been alone.
    Source: Shreedhar and Varghese 1995, "Efficient fair queuing using deficit round robin"; with
    counters of tokens: Sheng et al. 2024 (arXiv 2401.00588), algorithm 2.
    """

    lines: dict[str, list[Place[T]]] = field(default_factory=dict)
    served: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    joined: int = 0

    def join(self, item: T, share: Share) -> Place[T]:
        line = self.lines.get(share.tenant)
        if line is None:
            level = min((self.served[tenant] for tenant in self.lines), default=self._newest())
            self.served[share.tenant] = max(self.served[share.tenant], level)
            line = self.lines[share.tenant] = []
        self.joined += 1
        place = Place(share.rank, self.joined, item, share.cost)
        insort(line, place)
        return place

    def _newest(self) -> int:
        """With nobody waiting all start level: at the most that anyone has been served."""
        return max(self.served.values(), default=0)

    def leave(self, place: Place[T], tenant: str) -> None:
        line = self.lines[tenant]
        del line[bisect_left(line, place)]
        if not line:
            del self.lines[tenant]

    def in_order(self) -> Iterator[T]:
        """As they would be served if each could be: at every turn the least served tenant's.

        Of those level with one another the one with the shortest line goes first.
        """
        turns = [
            (self.served[tenant], len(line), tenant, iter(line))
            for tenant, line in self.lines.items()
        ]
        heapq.heapify(turns)
        while turns:
            served, left, tenant, line = turns[0]
            place = next(line)
            yield place.item
            if left > 1:
                heapq.heapreplace(turns, (served + place.cost, left - 1, tenant, line))
            else:
                heapq.heappop(turns)


class WaitingQueue(Generic[T]):
    """Items by priority, then fair by tokens between tenants, then by rank, then as they came.

    Not thread-safe.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._ahead: dict[int, T] = {}  # by id() of the item, as the next
        self._places: dict[int, tuple[Share, Place[T]]] = {}
        self._levels: dict[int, Level[T]] = {}
        self._waiting: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._ahead) + len(self._places)

    def __iter__(self) -> Iterator[T]:
        """In the order in which they should be served; safe against changes meanwhile."""
        levels = [self._levels[priority].in_order() for priority in sorted(self._levels)[::-1]]
        return iter([*self._ahead.values(), *itertools.chain.from_iterable(levels)])

    def join(self, item: T, share: Share) -> T | None:
        """Add an item, where its rank is in the line of its tenant and priority.

        A full queue is shared out too: whoever fills most of it gives way to others.

        Returns:
            An item that had to leave for this one; None if there was room.
        Raises:
            Overloaded: the queue is full, and nobody has more in it than this tenant.
        """
        pushed_out = None
        if len(self) >= self._limit:
            pushed_out = self._give_way(share)
        self._waiting[share.tenant] += 1
        self._places[id(item)] = share, self._level(share).join(item, share)
        return pushed_out

    def rejoin(self, item: T) -> None:
        """Add an item that was served before: ahead of all newcomers, and whatever the limit."""
        self._ahead[id(item)] = item

    def leave(self, item: T) -> None:
        """Take an item out. Safe to repeat."""
        found = self._places.pop(id(item), None)
        if found is None:
            self._ahead.pop(id(item), None)
            return
        share, place = found
        self._waiting[share.tenant] -= 1
        self._level(share).leave(place, share.tenant)

    def charge(self, share: Share, tokens: int) -> None:
        """Count tokens that a tenant was served; below 0 those it was charged in vain."""
        self._level(share).served[share.tenant] += tokens

    def _level(self, share: Share) -> Level[T]:
        return self._levels.setdefault(share.priority, Level())

    def _give_way(self, share: Share) -> T:
        """Take out the last item, of the lowest priority, of the tenant that has most of them.

        Source: McKenney 1990, "Stochastic fairness queueing": buffers are taken from the longest.
        """
        [(tenant, most)] = self._waiting.most_common(1) or [("", 0)]
        if most <= self._waiting[share.tenant] + 1:
            raise Overloaded(
                f"queue has {len(self)} requests, {self._waiting[share.tenant]} of them of tenant "
                f"{share.tenant!r}; the limit is {self._limit}"
            )
        lines = (self._levels[p].lines.get(tenant) for p in sorted(self._levels))
        last = next(line for line in lines if line)[-1].item
        self.leave(last)
        return last
