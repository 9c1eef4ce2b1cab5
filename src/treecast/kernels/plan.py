"""What attention must know of one packed pass, worked out once and used by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from treecast.kernels.scores import PLAIN, ScoreRule


@dataclass(frozen=True, slots=True)
class SegmentLayout:
    """Rows of one sequence in a packed pass, and where its keys and values lie.

    Slots are the sequence's committed positions, then its uncommitted rows; the pass computes the
    last rows.

    Attributes:
        first_row: the segment's first row in the pass.
        num_rows: rows of the segment.
        length: committed positions.
        parents: [rows, old and new] as in `engine.base.Segment`.
        first_place: place in the pool of slot 0, where all slots lie in one run; else None.
        places: [slots] place of every slot.
    """

    first_row: int
    num_rows: int
    length: int
    parents: Sequence[int]
    first_place: int | None
    places: Sequence[int]

    @property
    def num_slots(self) -> int:
        return self.length + len(self.parents)

    @property
    def first_new_slot(self) -> int:
        return self.num_slots - self.num_rows

    def visible(self) -> NDArray[np.bool_]:
        """[num_rows, all uncommitted rows]: which rows each new row sees, itself among them."""
        count = len(self.parents)
        if all(parent == row - 1 for row, parent in enumerate(self.parents)):
            return np.tri(count, dtype=np.bool_)[count - self.num_rows :]
        seen = np.zeros((count, count), dtype=np.bool_)
        for row, parent in enumerate(self.parents):
            if parent >= 0:
                seen[row] = seen[parent]
            seen[row, row] = True
        return seen[count - self.num_rows :]

    def positions(self) -> NDArray[np.int64]:
        """[slots] position of every slot."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        behind = self.length + np.array(depths, dtype=np.int64)
        return np.concatenate((np.arange(self.length), behind))

    def path_slots(self, row: int, first: int = 0) -> list[int]:
        """Slots that uncommitted row `row` sees, by position, from a committed one on."""
        rows: list[int] = []
        while row >= 0:
            rows.append(self.length + row)
            row = self.parents[row]
        return [*range(first, self.length), *reversed(rows)]


class LayerAttention(Protocol):
    """Attention of a packed pass, over one layer at a time."""

    def __call__(
        self,
        query: Tensor,  # [query heads, rows, head dim]
        key: Tensor,  # [KV heads, rows, head dim]
        value: Tensor,  # [KV heads, rows, value dim]
        key_pool: Tensor,  # [KV heads, places, head dim], written to
        value_pool: Tensor,  # [KV heads, places, value dim], written to
        scaling: float,
        out: Tensor,  # [rows, query heads, value dim], written to
        rule: ScoreRule = PLAIN,
    ) -> None: ...
