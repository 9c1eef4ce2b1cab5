"""Which rows of a segment attend to which list of keys in one matrix product."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treecast.kernels.plan import SegmentLayout
from treecast.prefix import PAGE_TOKENS

BLOCK = PAGE_TOKENS
"""Positions of a logical block, a page; their products are added up before the blocks are."""

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
    positions: NDArray[np.int64]
    visible: NDArray[np.bool_]

    @property
    def num_blocks(self) -> int:
        """Logical blocks that lie in the list whole, in place and alone."""
        return leading_blocks(self.positions - self.positions[0])

    def offsets(self) -> NDArray[np.int64]:
        """[rows, keys] position of the key minus that of the row, the last that the row sees."""
        own = np.where(self.visible, self.positions, -1).max(1)
        offsets: NDArray[np.int64] = self.positions - own[:, None]
        return offsets

    def within(self, window: int) -> KeyGroup:
        """The same rows, seeing the last `window` positions; blocks that none sees are left out.

        Those would add exact zeros, so no bit depends on whether they are there.
        """
        visible = self.visible & (self.offsets() > -window)
        first = int(self.positions[visible.any(0)].min())
        unseen = min(first // BLOCK, self.num_blocks) * BLOCK
        return KeyGroup(
            self.rows, self.slots[unseen:], self.positions[unseen:], visible[:, unseen:]
        )


def leading_blocks(positions: NDArray[np.int64]) -> int:
    """Blocks at the front of a list of keys whose every key is at its position.

    A block does not count if a key behind belongs to it too (a sibling of one in the block).
    """
    moved = np.flatnonzero(positions != np.arange(len(positions)))
    leading = int(moved[0]) if len(moved) else len(positions)
    return int(positions[leading:].min(initial=leading)) // BLOCK


def group_rows(layout: SegmentLayout) -> list[KeyGroup]:
    """Split a segment so that at most `MAX_TAIL` keys of a group lie behind its leading blocks."""
    positions = layout.positions()
    if _num_tail(positions) > MAX_TAIL:
        return _Splitter(layout, positions).groups()
    visible = np.ones((layout.num_rows, layout.num_slots), dtype=np.bool_)
    visible[:, layout.length :] = layout.visible()
    rows = range(layout.first_row, layout.first_row + layout.num_rows)
    return [KeyGroup(rows, range(layout.num_slots), positions, visible)]


class _Splitter:
    """Groups of a segment whose rows do not fit one product. Rows are numbered by their slots.

    Whole committed blocks lead every row's path; they are left out until the groups are made.
    """

    def __init__(self, layout: SegmentLayout, positions: NDArray[np.int64]) -> None:
        self._layout = layout
        self._positions = positions
        self._num_whole = layout.length // BLOCK * BLOCK
        self._paths = {
            slot: layout.path_slots(slot - layout.length, self._num_whole)
            for slot in range(layout.first_new_slot, layout.num_slots)
        }

    def groups(self) -> list[KeyGroup]:
        """Groups of neighbours in the tree, as many as their keys allow.

        A row by itself always fits: its path is in place, so less than a block lies behind.
        """
        groups: list[KeyGroup] = []
        members: list[int] = []
        keys: set[int] = set()
        for slot in sorted(self._paths, key=self._paths.__getitem__):
            wider = keys.union(self._paths[slot])
            if members and self._tail(wider) > MAX_TAIL:
                groups.append(self._group(sorted(members), sorted(keys)))
                members, wider = [], set(self._paths[slot])
            members.append(slot)
            keys = wider
        return [*groups, self._group(sorted(members), sorted(keys))]

    def _tail(self, slots: Iterable[int]) -> int:
        return _num_tail(self._positions[sorted(slots)] - self._num_whole)

    def _group(self, members: list[int], keys: list[int]) -> KeyGroup:
        layout, whole = self._layout, self._num_whole
        slots = [*range(whole), *keys]
        column = {slot: i for i, slot in enumerate(keys, whole)}
        visible = np.zeros((len(members), len(slots)), dtype=np.bool_)
        visible[:, :whole] = True
        for i, slot in enumerate(members):
            visible[i, [column[seen] for seen in self._paths[slot]]] = True
        rows = [layout.first_row + slot - layout.first_new_slot for slot in members]
        return KeyGroup(rows, slots, self._positions[slots], visible)


def _num_tail(positions: NDArray[np.int64]) -> int:
    return len(positions) - leading_blocks(positions) * BLOCK
