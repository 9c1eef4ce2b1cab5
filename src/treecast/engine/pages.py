"""Which pages of a pool are free, and how many sequences hold each of the others."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from treecast.errors import Overloaded


class PageTable:
    """Free pages as runs, held pages with a count of their holders; free + used == total.

    Nothing here knows what a page contains.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._holders = [0] * total
        # Runs of free pages, apart and ascending: starts[i] .. starts[i] + sizes[i] - 1.
        self._starts = [0] if total else []
        self._sizes = [total] if total else []
        self._free = total

    @property
    def free(self) -> int:
        return self._free

    @property
    def used(self) -> int:
        return self.total - self._free

    def is_shared(self, page: int) -> bool:
        return self._holders[page] > 1

    def require(self, needed: int, purpose: str) -> None:
        """Raise Overloaded unless `needed` pages are free."""
        if needed > self._free:
            raise Overloaded(
                f"KV pool: {purpose} needs {needed} pages; {self._free} of {self.total} are free"
            )

    def take(self, count: int) -> list[int]:
        """Hold `count` free pages: one run (the smallest that fits), else several, largest first.

        The caller has seen that enough are free.
        """
        if count == 0:
            return []
        run = self.find_run(count)
        if run is not None:
            return self.take_at(run, count)
        pages: list[int] = []
        while len(pages) < count:
            largest = max(range(len(self._sizes)), key=lambda i: (self._sizes[i], -i))
            part = min(self._sizes[largest], count - len(pages))
            pages += self.take_at(self._starts[largest], part)
        return pages

    def find_run(self, count: int) -> int | None:
        """First page of the smallest free run of at least `count` pages."""
        fits = [(size, start) for start, size in self._runs() if size >= count]
        return min(fits)[1] if fits else None

    def is_free_run(self, start: int, count: int) -> bool:
        """Whether the pages start .. start + count - 1 are all free."""
        at = bisect_left(self._starts, start + 1) - 1
        return at >= 0 and start + count <= self._starts[at] + self._sizes[at]

    def take_at(self, start: int, count: int) -> list[int]:
        """Hold the free pages start .. start + count - 1."""
        assert self.is_free_run(start, count)
        at = bisect_left(self._starts, start + 1) - 1
        first, size = self._starts.pop(at), self._sizes.pop(at)
        self._insert_run(at, start + count, first + size - start - count)
        self._insert_run(at, first, start - first)
        self._free -= count
        pages = list(range(start, start + count))
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Count one more holder of each page."""
        for page in pages:
            assert self._holders[page] > 0
            self._holders[page] += 1

    def give(self, pages: Sequence[int]) -> None:
        """Count one holder less of each page; those without holders become free."""
        for page in pages:
            assert self._holders[page] > 0
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._release(page)

    def _runs(self) -> Iterable[tuple[int, int]]:
        return zip(self._starts, self._sizes, strict=True)

    def _insert_run(self, at: int, start: int, size: int) -> None:
        if size:
            self._starts.insert(at, start)
            self._sizes.insert(at, size)

    def _release(self, page: int) -> None:
        """Put a page among the free runs, joining its neighbours."""
        self._free += 1
        at = bisect_left(self._starts, page)
        joins_next = at < len(self._starts) and self._starts[at] == page + 1
        joins_last = at > 0 and self._starts[at - 1] + self._sizes[at - 1] == page
        if joins_last and joins_next:
            self._sizes[at - 1] += 1 + self._sizes.pop(at)
            self._starts.pop(at)
        elif joins_last:
            self._sizes[at - 1] += 1
        elif joins_next:
            self._starts[at] = page
            self._sizes[at] += 1
        else:
            self._insert_run(at, page, 1)
