"""Where every sequence's keys and values lie: pages, copy-on-write forks, commits.

A sequence's *slots* are numbered from 0: its committed positions first, then its uncommitted tree
rows. Slot s lies in page `pages[s // PAGE_TOKENS]`, so a *place* of the pool is
`page * PAGE_TOKENS + s % PAGE_TOKENS`. Contents move through `Storage` alone: this module does
the accounts, and torch is not needed for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, pairwise, takewhile
from typing import Protocol

from treecast.engine.base import PoolUsage
from treecast.engine.pages import PageTable
from treecast.errors import InvalidTree
from treecast.prefix import PAGE_TOKENS as PAGE_TOKENS  # bench.pages sets it here


class Storage(Protocol):
    """The pool's contents, and what was swapped out of it. Calls take effect in their order."""

    @property
    def position_bytes(self) -> int:
        """See `PoolUsage.position_bytes`."""

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy places; all are read before any is written."""

    def save(self, key: int, places: Sequence[int]) -> None:
        """Keep what is in some places, in their order, under a new key."""

    def load(self, key: int, places: Sequence[int]) -> None:
        """Write what was saved under a key into as many places; the key is used up."""

    def forget(self, key: int) -> None:
        """Drop what was saved under a key."""


@dataclass(frozen=True, slots=True, eq=False)
class SwappedSequence:
    """What `KVPool.swap_out` leaves of a sequence: `key` is the storage's."""

    key: int
    length: int
    nbytes: int
    adapter: str = ""


class PagedSequence:
    """One sequence's pages and tree rows; changed by `KVPool` alone.

    Attributes:
        pages: in slot order; empty once freed.
        length: committed positions.
        parents: [num_rows] parent of each uncommitted row among them, or -1.
        depths: [num_rows] 0 for a row that follows the committed positions.
        adapter: what its keys and values are computed with, beside the model; empty for none.
    """

    __slots__ = ("_table", "adapter", "depths", "freed", "length", "pages", "parents")

    def __init__(
        self, table: PageTable, pages: list[int], length: int = 0, adapter: str = ""
    ) -> None:
        self._table = table
        self.adapter = adapter
        self.pages = pages
        self.length = length
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.freed = False

    @property
    def num_rows(self) -> int:
        return len(self.parents)

    @property
    def num_slots(self) -> int:
        """Slots in use: committed positions and rows."""
        return self.length + len(self.parents)

    @property
    def capacity(self) -> int:
        """Slots that may be written or are committed."""
        return self.length if self.ends_shared else len(self.pages) * PAGE_TOKENS

    @property
    def ends_shared(self) -> bool:
        """Whether the next position's page has committed positions and other holders.

        It must be copied before the next row is written.
        """
        page, offset = divmod(self.length, PAGE_TOKENS)
        return offset > 0 and self._table.is_shared(self.pages[page])

    @property
    def own_pages(self) -> int:
        """Pages that no other sequence holds: those that come free with it."""
        return len(self.pages) - self._num_shared

    @property
    def shared_pages(self) -> int:
        """Pages of committed positions that others hold too and that need not be copied."""
        return min(self._num_shared, self.length // PAGE_TOKENS)

    @property
    def _num_shared(self) -> int:
        """Forks share what comes first, so that no shared page follows one's own."""
        return sum(1 for _ in takewhile(self._table.is_shared, self.pages))

    @property
    def is_contiguous(self) -> bool:
        """Whether the pages form one run."""
        return all(b == a + 1 for a, b in pairwise(self.pages))

    def places(self, start: int, stop: int) -> list[int]:
        """Places of slots start .. stop - 1."""
        return [
            self.pages[slot // PAGE_TOKENS] * PAGE_TOKENS + slot % PAGE_TOKENS
            for slot in range(start, stop)
        ]


class KVPool:
    """Accounts of the pool, and every decision about which page holds what.

    A page that several sequences hold is never written. Every method either does all it says or
    raises and changes nothing.
    """

    def __init__(self, total_pages: int, storage: Storage) -> None:
        self._table = PageTable(total_pages)
        self._storage = storage
        self._keys = count(1)

    @property
    def usage(self) -> PoolUsage:
        table, position_bytes = self._table, self._storage.position_bytes
        return PoolUsage(table.total, table.free, table.used, PAGE_TOKENS, position_bytes)

    def allocate(self, capacity: int, adapter: str = "") -> PagedSequence:
        """See `Engine.allocate`; which adapters there are is not known here."""
        count = num_pages(capacity)
        self._table.require(count, f"a sequence of {capacity} positions")
        return PagedSequence(self._table, self._table.take(count), adapter=adapter)

    def reserve(self, sequence: PagedSequence, capacity: int) -> None:
        """See `Engine.reserve`."""
        self._check(sequence)
        if capacity <= sequence.capacity:
            return
        copies = int(sequence.ends_shared)
        growth = max(0, num_pages(capacity) - len(sequence.pages))
        self._table.require(growth + copies, f"growing a sequence to {capacity} positions")
        if copies:
            self._unshare_end(sequence)
        if growth:
            self._grow(sequence, growth)

    def fork(self, sequence: PagedSequence, length: int, capacity: int) -> PagedSequence:
        """See `Engine.fork`."""
        self._check(sequence)
        if not 0 <= length <= sequence.length:
            raise ValueError(f"cannot fork at {length}: {sequence.length} positions are committed")
        full = length // PAGE_TOKENS
        count = num_pages(max(length, capacity)) - full
        self._table.require(count, f"a fork of {capacity} positions, {length} of them shared,")
        shared = sequence.pages[:full]
        self._table.share(shared)
        pages = shared + self._table.take(count)
        forked = PagedSequence(self._table, pages, length, sequence.adapter)
        start = full * PAGE_TOKENS
        self._copy(sequence.places(start, length), forked.places(start, length))
        return forked

    def truncate(self, sequence: PagedSequence, length: int) -> None:
        """See `Engine.truncate`.

        Pages behind `length` that others hold too leave the reservation: they cannot be written.
        """
        self._check(sequence)
        if not 0 <= length <= sequence.length:
            raise ValueError(
                f"cannot truncate to {length}: {sequence.length} positions are committed"
            )
        sequence.parents, sequence.depths, sequence.length = [], [], length
        behind = sequence.pages[num_pages(length) :]
        shared = [page for page in behind if self._table.is_shared(page)]
        sequence.pages = [page for page in sequence.pages if page not in shared]
        self._table.give(shared)

    def trim(self, sequence: PagedSequence) -> None:
        """See `Engine.trim`. Rows are dropped."""
        self.truncate(sequence, sequence.length)
        kept = num_pages(sequence.length)
        self._table.give(sequence.pages[kept:])
        del sequence.pages[kept:]

    def free(self, sequence: PagedSequence) -> None:
        """See `Engine.free`."""
        self._check(sequence)
        self._table.give(sequence.pages)
        sequence.pages, sequence.parents, sequence.depths = [], [], []
        sequence.length, sequence.freed = 0, True

    def swap_out(self, sequence: PagedSequence) -> SwappedSequence:
        """See `Engine.swap_out`. Rows are dropped."""
        self._check(sequence)
        key, length = next(self._keys), sequence.length
        self._storage.save(key, sequence.places(0, length))
        self.free(sequence)
        nbytes = length * self._storage.position_bytes
        return SwappedSequence(key, length, nbytes, sequence.adapter)

    def swap_in(self, swapped: SwappedSequence, capacity: int) -> PagedSequence:
        """See `Engine.swap_in`."""
        sequence = self.allocate(max(capacity, swapped.length), swapped.adapter)
        sequence.length = swapped.length
        self._storage.load(swapped.key, sequence.places(0, swapped.length))
        return sequence

    def discard(self, swapped: SwappedSequence) -> None:
        """See `Engine.discard`."""
        self._storage.forget(swapped.key)

    def append(self, sequence: PagedSequence, parents: Sequence[int]) -> None:
        """Add uncommitted rows, growing the reservation where it is too small.

        Args:
            sequence: changed in place.
            parents: [n] as in `Segment.parents`.

        Raises:
            InvalidTree: a parent does not precede its row.
            Overloaded: the reservation is too small and too few pages are free.
        """
        self._check(sequence)
        depths = list(sequence.depths)
        for row, parent in enumerate(parents, start=len(depths)):
            if not -1 <= parent < row:
                raise InvalidTree(f"row {row} has parent {parent}; a parent precedes its row")
            depths.append(0 if parent < 0 else depths[parent] + 1)
        self.reserve(sequence, sequence.length + len(depths))
        sequence.depths = depths
        sequence.parents = [*sequence.parents, *parents]

    def drop_rows(self, sequence: PagedSequence, num_rows: int) -> None:
        """Forget all uncommitted rows but the first `num_rows`."""
        del sequence.parents[num_rows:]
        del sequence.depths[num_rows:]

    def commit(
        self, sequence: PagedSequence, path: Sequence[int], keep: Sequence[int] = ()
    ) -> None:
        """See `Engine.commit`.

        Raises:
            InvalidTree: `path` is no chain from a root row, or `keep` lacks a parent.
        """
        self._check(sequence)
        parents = _parents_after(sequence.parents, path, keep)
        order = [*path, *keep]
        sources = sequence.places(sequence.length, sequence.num_slots)
        moved = [(sources[row], sources[i]) for i, row in enumerate(order) if row != i]
        self._copy([source for source, _ in moved], [target for _, target in moved])
        sequence.depths = [sequence.depths[row] - len(path) for row in keep]
        sequence.parents = parents
        sequence.length += len(path)

    def _check(self, sequence: PagedSequence) -> None:
        if sequence.freed:
            raise ValueError("the sequence was freed")

    def _copy(self, sources: list[int], targets: list[int]) -> None:
        if sources:
            self._storage.copy(sources, targets)

    def _unshare_end(self, sequence: PagedSequence) -> None:
        """Copy the page of the next position, which others hold too."""
        index = sequence.length // PAGE_TOKENS
        start = index * PAGE_TOKENS
        sources = sequence.places(start, sequence.length)
        old = sequence.pages[index]
        sequence.pages[index] = self._table.take(1)[0]
        self._copy(sources, sequence.places(start, sequence.length))
        self._table.give([old])

    def _grow(self, sequence: PagedSequence, growth: int) -> None:
        """Add pages: behind the last one, else all as one new run, else wherever they are."""
        pages = sequence.pages
        behind = pages[-1] + 1 if pages else 0
        if pages and sequence.is_contiguous and self._table.is_free_run(behind, growth):
            pages += self._table.take_at(behind, growth)
        elif (run := self._run_to_move_to(sequence, len(pages) + growth)) is not None:
            self._move(sequence, self._table.take_at(run, len(pages) + growth))
        elif pages and self._table.is_free_run(behind, growth):
            pages += self._table.take_at(behind, growth)
        else:
            pages += self._table.take(growth)

    def _run_to_move_to(self, sequence: PagedSequence, count: int) -> int | None:
        if any(self._table.is_shared(page) for page in sequence.pages):
            return None
        return self._table.find_run(count)

    def _move(self, sequence: PagedSequence, pages: list[int]) -> None:
        sources = sequence.places(0, sequence.num_slots)
        old, sequence.pages = sequence.pages, pages
        self._copy(sources, sequence.places(0, sequence.num_slots))
        self._table.give(old)


def num_pages(positions: int) -> int:
    """Pages that hold so many positions."""
    if positions < 0:
        raise ValueError(f"a sequence cannot have {positions} positions")
    return -(-positions // PAGE_TOKENS)


def _parents_after(parents: Sequence[int], path: Sequence[int], keep: Sequence[int]) -> list[int]:
    """Parents of the kept rows, renumbered as they will be once `path` is committed."""
    last = -1
    for row in path:
        if not 0 <= row < len(parents) or parents[row] != last:
            raise InvalidTree(f"row {row} of the committed path does not follow row {last}")
        last = row
    renamed = {last: -1}
    kept: list[int] = []
    for new, row in enumerate(keep):
        in_order = 0 <= row < len(parents) and (new == 0 or row > keep[new - 1])
        if not in_order or parents[row] not in renamed:
            raise InvalidTree(f"kept row {row} has no parent among the kept, or is out of order")
        kept.append(renamed[parents[row]])
        renamed[row] = new
    return kept
