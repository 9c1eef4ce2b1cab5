"""Which rows of a segment attend to which list of keys in one matrix product."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treecast.kernels.plan import SegmentLayout

BLOCK = 64
"""Positions of a logical block; their products are added up before the blocks are."""

MAX_TAIL = 192
"""Most keys in one product: beyond, the matrix library adds them up in parts."""


@dataclass(frozen=True, slots=True)
class KeyGroup:
    """Rows that attend to one list of keys.

    Attributes:
        rows: rows in the packed pass.
        slots: the keys; every row's own path is among them, in order of position.
        positions: of each key.
        visible: [rows, keys].
    """

    rows: Sequence[int]
    slots: Sequence[int]
    positions: Sequence[int]
    visible: NDArray[np.bool_]

    @property
    def num_blocks(self) -> int:
        """Logical blocks that lie in the list whole, in place and alone."""
        return leading_blocks(self.positions)


def leading_blocks(positions: Sequence[int]) -> int:
    """Blocks at the front of a list of keys whose every key is at its position.

    A block does not count if a key behind belongs to it too (a sibling of one in the block).
    """
    leading = 0
    while leading < len(positions) and positions[leading] == leading:
        leading += 1
    return min(leading, *positions[leading:], leading) // BLOCK


def group_rows(layout: SegmentLayout) -> list[KeyGroup]:
    """Split a segment so that at most `MAX_TAIL` keys of a group lie behind its leading blocks."""
    positions = [*range(layout.length), *(layout.length + depth for depth in _depths(layout))]
    if _num_tail(positions) > MAX_TAIL:
        return _Splitter(layout, positions).groups()
    visible = np.ones((layout.num_rows, layout.num_slots), dtype=np.bool_)
    visible[:, layout.length :] = layout.visible()
    rows = range(layout.first_row, layout.first_row + layout.num_rows)
    return [KeyGroup(rows, range(layout.num_slots), positions, visible)]


class _Splitter:
    """Groups of a segment whose rows do not fit one product. Rows are numbered by their slots."""

    def __init__(self, layout: SegmentLayout, positions: Sequence[int]) -> None:
        self._layout = layout
        self._positions = positions
        first_new = layout.first_new_slot
        self._paths = {
            slot: layout.path_slots(slot - layout.length)
            for slot in range(first_new, layout.num_slots)
        }

    def groups(self) -> list[KeyGroup]:
        alone = {slot for slot, path in self._paths.items() if self._tail(path) > MAX_TAIL}
        shared = [slot for slot in self._paths if slot not in alone]
        return [*self._along_paths(alone), *self._by_common_keys(shared)]

    def _along_paths(self, left: set[int]) -> list[KeyGroup]:
        """Groups for rows too deep to share: each holds the rows of one path."""
        groups: list[KeyGroup] = []
        while left:
            deepest = max(left, key=lambda slot: (len(self._paths[slot]), -slot))
            path = self._paths[deepest]
            groups.append(self._group([slot for slot in path if slot in left], path))
            left = left.difference(path)
        return groups

    def _by_common_keys(self, slots: list[int]) -> list[KeyGroup]:
        """Groups of neighbours in the tree, as many as their keys allow."""
        groups: list[KeyGroup] = []
        members: list[int] = []
        keys: set[int] = set()
        for slot in sorted(slots, key=self._paths.__getitem__):
            wider = keys.union(self._paths[slot])
            if members and self._tail(wider) > MAX_TAIL:
                groups.append(self._group(sorted(members), sorted(keys)))
                members, wider = [], set(self._paths[slot])
            members.append(slot)
            keys = wider
        return [*groups, self._group(sorted(members), sorted(keys))] if members else groups

    def _tail(self, slots: Iterable[int]) -> int:
        return _num_tail([self._positions[slot] for slot in sorted(slots)])

    def _group(self, members: list[int], slots: list[int]) -> KeyGroup:
        layout = self._layout
        column = {slot: i for i, slot in enumerate(slots)}
        visible = np.zeros((len(members), len(slots)), dtype=np.bool_)
        for i, slot in enumerate(members):
            visible[i, [column[seen] for seen in self._paths[slot]]] = True
        rows = [layout.first_row + slot - layout.first_new_slot for slot in members]
        return KeyGroup(rows, slots, [self._positions[slot] for slot in slots], visible)


def _num_tail(positions: Sequence[int]) -> int:
    return len(positions) - leading_blocks(positions) * BLOCK


def _depths(layout: SegmentLayout) -> list[int]:
    depths: list[int] = []
    for parent in layout.parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return depths
