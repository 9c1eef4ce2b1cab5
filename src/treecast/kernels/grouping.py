"""Which rows of a segment attend to which list of keys in one matrix product."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treecast.kernels.plan import SegmentLayout

MAX_TAIL = 192
"""Most keys in one product: beyond, the matrix library adds them up in parts."""


@dataclass(frozen=True, slots=True)
class KeyGroup:
    """Rows that attend to one list of keys.

    Attributes:
        rows: rows in the packed pass.
        slots: the keys; every row's own path is among them, in order of position.
        positions: of each key.
        num_leading: keys whose index in `slots` is their position.
        visible: [rows, keys].
    """

    rows: Sequence[int]
    slots: Sequence[int]
    positions: Sequence[int]
    num_leading: int
    visible: NDArray[np.bool_]


def group_rows(layout: SegmentLayout, block: int = 64) -> list[KeyGroup]:
    """Split a segment so that at most `MAX_TAIL` keys of a group lie behind its leading blocks."""
    first_tail = layout.num_leading // block * block
    if layout.num_slots - first_tail <= MAX_TAIL:
        return [_whole(layout)]
    return _Splitter(layout, block).groups()


def _whole(layout: SegmentLayout) -> KeyGroup:
    visible = np.ones((layout.num_rows, layout.num_slots), dtype=np.bool_)
    visible[:, layout.length :] = layout.visible()
    rows = range(layout.first_row, layout.first_row + layout.num_rows)
    slots = range(layout.num_slots)
    positions = [*range(layout.length), *(layout.length + depth for depth in _depths(layout))]
    return KeyGroup(rows, slots, positions, layout.num_leading, visible)


class _Splitter:
    """Groups of a segment whose rows do not fit one product."""

    def __init__(self, layout: SegmentLayout, block: int) -> None:
        self._layout = layout
        self._block = block
        self._first_new = len(layout.parents) - layout.num_rows
        self._positions = [layout.length + depth for depth in _depths(layout)]
        self._paths = {
            row: layout.path_slots(row) for row in range(self._first_new, len(layout.parents))
        }

    def groups(self) -> list[KeyGroup]:
        long = [row for row in self._paths if self._tail(self._keys(row)) > MAX_TAIL]
        short = [row for row in self._paths if row not in set(long)]
        return [*self._along_paths(long), *self._by_common_keys(short)]

    def _along_paths(self, rows: list[int]) -> list[KeyGroup]:
        """Groups for rows too deep to share: each holds the rows of one path."""
        groups: list[KeyGroup] = []
        left = set(rows)
        while left:
            deepest = max(left, key=lambda row: (len(self._paths[row]), -row))
            path = self._paths[deepest]
            members = [slot - self._layout.length for slot in self._keys(deepest)]
            members = [row for row in members if row in left]
            groups.append(self._group(members, path, len(path)))
            left.difference_update(members)
        return groups

    def _by_common_keys(self, rows: list[int]) -> list[KeyGroup]:
        """Groups of neighbours in the tree, as many as their keys allow."""
        groups: list[KeyGroup] = []
        members: list[int] = []
        keys: set[int] = set()
        for row in sorted(rows, key=lambda row: self._paths[row]):
            wider = keys.union(self._keys(row))
            if members and self._tail(wider) > MAX_TAIL:
                groups.append(self._shared(members, keys))
                members, wider = [], set(self._keys(row))
            members.append(row)
            keys = wider
        return [*groups, self._shared(members, keys)] if members else groups

    def _keys(self, row: int) -> list[int]:
        """Uncommitted slots that a row sees."""
        return self._paths[row][self._layout.length :]

    def _tail(self, keys: Collection[int]) -> int:
        """Keys behind the leading blocks, of a group with these uncommitted slots."""
        leading = self._num_leading(sorted(keys))
        return self._layout.length + len(keys) - leading // self._block * self._block

    def _num_leading(self, keys: Sequence[int]) -> int:
        """Keys whose index is their position, the committed ones among them."""
        leading = self._layout.length
        for slot in keys:
            if slot != leading or leading >= self._layout.num_leading:
                break
            leading += 1
        return leading

    def _shared(self, members: list[int], keys: set[int]) -> KeyGroup:
        ordered = sorted(keys)
        slots = [*range(self._layout.length), *ordered]
        return self._group(sorted(members), slots, self._num_leading(ordered))

    def _group(self, members: list[int], slots: list[int], num_leading: int) -> KeyGroup:
        layout = self._layout
        column = {slot: i for i, slot in enumerate(slots)}
        visible = np.zeros((len(members), len(slots)), dtype=np.bool_)
        for i, row in enumerate(members):
            visible[i, [column[slot] for slot in self._paths[row]]] = True
        rows = [layout.first_row + row - self._first_new for row in members]
        positions = [
            slot if slot < layout.length else self._positions[slot - layout.length]
            for slot in slots
        ]
        return KeyGroup(rows, slots, positions, num_leading, visible)


def _depths(layout: SegmentLayout) -> list[int]:
    depths: list[int] = []
    for parent in layout.parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return depths
