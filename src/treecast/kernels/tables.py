"""A packed pass as one array of integers, for kernels that read pages themselves.

Work is cut into *items*: some rows of one segment (a *tile*) against some of its pages. An item of
a pass is one program of a kernel per KV head, so the items of all sequences run side by side. The
array has a fixed part (items, then rows), whose size depends on how many of each there may be, and
behind it lists of any length that the fixed part points into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treecast.kernels.plan import SegmentLayout
from treecast.prefix import PAGE_TOKENS

ITEM_COLUMNS = 5
"""Of an item: first row, rows, where its segment's header is, first page, page to stop at."""

ROW_COLUMNS = 7
"""Of a row: place (-1: none), depth, where its visible bits are, first item, items, row in the
tile, where its segment's header is."""

HEADER_COLUMNS = 4
"""Of a segment: committed positions, uncommitted rows, where its pages are, and its depths."""

WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a pass is cut.

    Attributes:
        tile_rows: rows of a tile at most.
        split_pages: pages of an item at most.
        aligned: items begin at multiples of `split_pages` and hold whole committed pages alone.
    """

    tile_rows: int
    split_pages: int
    aligned: bool = False


@dataclass(frozen=True, slots=True)
class PassTables:
    """The array, and where its two fixed parts begin.

    Attributes:
        words: int32; items at 0, rows at `rows_at`, then the lists.
        num_items: items there is room for; those behind the last have no rows.
        num_rows: rows there is room for; those behind the last have no place and no items.
    """

    words: NDArray[np.int32]
    num_items: int
    num_rows: int

    @property
    def rows_at(self) -> int:
        return self.num_items * ITEM_COLUMNS


def split_pages(segments: Sequence[SegmentLayout], tile_rows: int, programs: int) -> int:
    """Pages of an item so that a pass has about `programs` of them."""
    total = sum(
        -(-segment.num_rows // tile_rows) * -(-segment.num_slots // PAGE_TOKENS)
        for segment in segments
    )
    return max(1, -(-total // max(1, programs)))


def count_items(segments: Sequence[SegmentLayout], tiling: Tiling) -> int:
    """Items of a pass."""
    return sum(
        -(-segment.num_rows // tiling.tile_rows) * len(_splits(segment, tiling))
        for segment in segments
    )


def build_tables(
    segments: Sequence[SegmentLayout],
    tiling: Tiling,
    num_items: int | None = None,
    num_rows: int | None = None,
    paths: bool = False,
) -> PassTables:
    """Lay a pass out for the kernels.

    Args:
        segments: those with rows; together they cover rows 0 .. n-1 in order.
        tiling: how to cut it.
        num_items: room for so many items; None for as many as there are.
        num_rows: room for so many rows; None for as many as there are.
        paths: instead of a row's visible bits, list the places of its path from the first page on
            that is not wholly committed.
    """
    items: list[tuple[int, ...]] = []
    rows: list[tuple[int, ...]] = []
    used = sum(segment.num_rows for segment in segments)
    item_room = count_items(segments, tiling) if num_items is None else num_items
    row_room = used if num_rows is None else num_rows
    lists = _Lists(item_room * ITEM_COLUMNS + row_room * ROW_COLUMNS)
    for segment in segments:
        _add_segment(segment, tiling, paths, items, rows, lists)
    assert len(items) <= item_room, f"{len(items)} items; there is room for {item_room}"
    assert len(rows) <= row_room, f"{len(rows)} rows; there is room for {row_room}"
    items += [(0,) * ITEM_COLUMNS] * (item_room - len(items))
    rows += [(-1, *(0,) * (ROW_COLUMNS - 1))] * (row_room - len(rows))
    fixed = np.array([n for line in (*items, *rows) for n in line], dtype=np.int32)
    return PassTables(np.concatenate([fixed, *lists.parts]), item_room, row_room)


class _Lists:
    """Lists of integers one behind the other."""

    def __init__(self, begin: int) -> None:
        self._end = begin
        self.parts: list[NDArray[np.int32]] = []

    def add(self, values: NDArray[np.int32]) -> int:
        """Append; returns where the list begins."""
        begin = self._end
        self.parts.append(values)
        self._end += len(values)
        return begin


def _add_segment(
    segment: SegmentLayout,
    tiling: Tiling,
    paths: bool,
    items: list[tuple[int, ...]],
    rows: list[tuple[int, ...]],
    lists: _Lists,
) -> None:
    depths = _depths(segment.parents)
    places = np.asarray(segment.places, dtype=np.int32)
    pages_at = lists.add(places[::PAGE_TOKENS] // PAGE_TOKENS)
    depths_at = lists.add(depths)
    header = (segment.length, len(segment.parents), pages_at, depths_at)
    header_at = lists.add(np.array(header, dtype=np.int32))
    seen_at = _add_paths(segment, places, lists) if paths else _add_bits(segment, lists)
    splits = _splits(segment, tiling)
    for begin in range(0, segment.num_rows, tiling.tile_rows):
        count = min(tiling.tile_rows, segment.num_rows - begin)
        first_item = len(items)
        items += [(segment.first_row + begin, count, header_at, *split) for split in splits]
        for row in range(begin, begin + count):
            slot = segment.first_new_slot + row
            depth = int(depths[slot - segment.length])
            at = (first_item, len(splits), row - begin, header_at)
            rows.append((int(places[slot]), depth, seen_at[row], *at))


def _splits(segment: SegmentLayout, tiling: Tiling) -> list[tuple[int, int]]:
    """First page and page to stop at of each item of a tile."""
    pages = (
        segment.length // PAGE_TOKENS if tiling.aligned else -(-segment.num_slots // PAGE_TOKENS)
    )
    if not tiling.aligned and pages:
        count = -(-pages // tiling.split_pages)
        return [(i * pages // count, (i + 1) * pages // count) for i in range(count)]
    starts = range(0, pages, tiling.split_pages)
    return [(start, min(start + tiling.split_pages, pages)) for start in starts]


def _depths(parents: Sequence[int]) -> NDArray[np.int32]:
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return np.array(depths, dtype=np.int32)


def _add_bits(segment: SegmentLayout, lists: _Lists) -> list[int]:
    """Which uncommitted rows each row sees, a bit each."""
    visible = segment.visible()
    count = -(-visible.shape[1] // WORD_BITS)
    padded = np.zeros((len(visible), count * WORD_BITS), dtype=np.bool_)
    padded[:, : visible.shape[1]] = visible
    words = np.packbits(padded, axis=1, bitorder="little").view("<i4").astype(np.int32)
    begin = lists.add(words.reshape(-1))
    return [begin + row * count for row in range(len(visible))]


def _add_paths(segment: SegmentLayout, places: NDArray[np.int32], lists: _Lists) -> list[int]:
    """Places of each row's path, from the first position of a page not wholly committed."""
    whole = segment.length // PAGE_TOKENS * PAGE_TOKENS
    ends: list[NDArray[np.int32]] = []
    for row, parent in enumerate(segment.parents):
        own = places[segment.length + row : segment.length + row + 1]
        before = ends[parent] if parent >= 0 else places[whole : segment.length]
        ends.append(np.concatenate((before, own)))
    return [lists.add(path) for path in ends[segment.first_new_slot - segment.length :]]
