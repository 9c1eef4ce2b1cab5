"""Tree attention whose bits do not depend on the tree or the batch around a row (CPU).

A row's result is, by definition: scores in float32; their maximum over all visible keys; for every
logical block of 64 positions the sums of exp(score - maximum) and of that times the values, each
added in order of position; then the blocks' sums added in order. The rest is only a fast way to
get those bits for many rows at once, and rests on what the matrix library does: an element of a
product is one chain of multiply-adds along the inner dimension, so a key that a row does not see
adds an exact zero wherever it lies. That holds for inner dimensions up to `MAX_TAIL` and for row
counts that are multiples of `ROW_TILE`; `engine.exactness` checks it on the machine at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from treecast.kernels.grouping import BLOCK, MAX_TAIL, KeyGroup, group_rows
from treecast.kernels.plan import SegmentLayout

ROW_TILE = 16


class ExactAttention:
    """Exact attention of a packed pass; see `plan.LayerAttention`. The pool must be float32."""

    def __init__(self, segments: Sequence[SegmentLayout]) -> None:
        self._segments = [_ExactSegment(segment) for segment in segments]

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        scaling: float,
        out: Tensor,
    ) -> None:
        for segment in self._segments:
            segment.write(key, value, key_pool, value_pool)
            for group in segment.groups:
                group.attend(query, key_pool, value_pool, scaling, out)


class _ExactSegment:
    def __init__(self, layout: SegmentLayout) -> None:
        self.groups = [_ExactGroup(layout, group) for group in group_rows(layout)]
        self._rows = slice(layout.first_row, layout.first_row + layout.num_rows)
        self._new: slice | Tensor
        if layout.first_place is not None:
            first = layout.first_place + layout.first_new_slot
            self._new = slice(first, first + layout.num_rows)
        else:
            self._new = torch.tensor(layout.places[layout.first_new_slot :])

    def write(self, key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor) -> None:
        key_pool[:, self._new] = key[:, self._rows].to(key_pool.dtype)
        value_pool[:, self._new] = value[:, self._rows].to(value_pool.dtype)


class _ExactGroup:
    """Rows that attend to one list of keys, with its masks."""

    def __init__(self, layout: SegmentLayout, group: KeyGroup) -> None:
        self._rows = _as_slice(group.rows)
        self._num_rows = len(group.rows)
        self._num_blocks = group.num_blocks
        tail = len(group.slots) - self._num_blocks * BLOCK
        self._tail = -(-tail // ROW_TILE) * ROW_TILE
        self._num_keys = self._num_blocks * BLOCK + self._tail
        self._keys = self._find_keys(layout, group)
        self._first_masked = layout.length
        self._mask = self._make_mask(group.visible)
        self._masks: dict[int, Tensor] = {}
        self._tail_blocks = self._make_tail_blocks(group.positions)
        self._ones = torch.ones(max(BLOCK, self._tail), ROW_TILE)

    def attend(
        self, query: Tensor, key_pool: Tensor, value_pool: Tensor, scaling: float, out: Tensor
    ) -> None:
        kv_heads, head_dim = key_pool.shape[0], query.shape[-1]
        group = query.shape[0] // kv_heads
        used = group * self._num_rows
        padded = query.new_zeros(
            (kv_heads, -(-used // ROW_TILE) * ROW_TILE, head_dim), dtype=torch.float32
        )
        rows = query[:, self._rows]
        torch.mul(rows.reshape(kv_heads, used, head_dim).float(), scaling, out=padded[:, :used])
        weights = self._weights(padded, key_pool[:, self._keys], group)
        sums, norm = self._weighted_sums(weights, value_pool[:, self._keys])
        attended = (sums / norm)[:, :used].reshape(query.shape[0], self._num_rows, -1)
        out[self._rows] = attended.transpose(0, 1).to(out.dtype)

    def _weights(self, query: Tensor, keys: Tensor, group: int) -> Tensor:
        """[KV heads, padded rows, keys] exp(score - maximum), 0 where a row does not see a key."""
        scores = torch.bmm(query, keys.transpose(1, 2))
        mask = self._mask_of(group, query.shape[1])
        if mask is not None:
            scores[:, :, self._first_masked :] += mask
        return scores.sub_(scores.amax(-1, keepdim=True)).exp_()

    def _weighted_sums(self, weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of weights times values, and of weights, by block, then over blocks in order."""
        kv_heads, rows, _ = weights.shape
        split = self._num_blocks * BLOCK
        sums: list[Tensor] = []
        norms: list[Tensor] = []
        if split:
            lead = weights[:, :, :split].reshape(kv_heads, rows, self._num_blocks, BLOCK)
            lead = lead.transpose(1, 2).contiguous()
            blocks = values[:, :split].reshape(kv_heads * self._num_blocks, BLOCK, -1)
            product = torch.bmm(lead.view(-1, rows, BLOCK), blocks)
            sums.append(product.view(kv_heads, self._num_blocks, rows, -1).transpose(0, 1))
            norm = lead.view(-1, BLOCK) @ self._ones[:BLOCK]
            norms.append(
                norm.view(kv_heads, self._num_blocks, rows, ROW_TILE).transpose(0, 1)[..., :1]
            )
        if self._tail:
            tail = weights[:, :, split:] * self._tail_blocks
            count = tail.shape[0]
            ends = values[:, split:].repeat(count, 1, 1)
            product = torch.bmm(tail.view(-1, rows, self._tail), ends)
            sums.append(product.view(count, kv_heads, rows, -1))
            norm = tail.view(-1, self._tail) @ self._ones[: self._tail]
            norms.append(norm.view(count, kv_heads, rows, ROW_TILE)[..., :1])
        return _add_in_order(torch.cat(sums)), _add_in_order(torch.cat(norms))

    def _find_keys(self, layout: SegmentLayout, group: KeyGroup) -> slice | Tensor:
        """Places of the keys, filled up to whole tiles with keys that nobody sees."""
        first = layout.first_place
        if first is not None and group.slots == range(layout.num_slots):
            return slice(first, first + self._num_keys)
        places = [layout.places[slot] for slot in group.slots]
        return torch.tensor(places + places[:1] * (self._num_keys - len(places)))

    def _make_mask(self, visible: np.ndarray) -> Tensor | None:
        """[rows, keys from the first masked on] 0 for a visible key, else minus infinity."""
        mask = np.full((len(visible), self._num_keys), -np.inf, dtype=np.float32)
        mask[:, : visible.shape[1]][visible] = 0
        mask = np.ascontiguousarray(mask[:, self._first_masked :])
        return torch.from_numpy(mask) if mask.any() else None

    def _mask_of(self, group: int, padded_rows: int) -> Tensor | None:
        if self._mask is None:
            return None
        if group not in self._masks:
            mask = torch.zeros(padded_rows, self._mask.shape[1])
            mask[: group * self._num_rows] = self._mask.repeat(group, 1)
            self._masks[group] = mask
        return self._masks[group]

    def _make_tail_blocks(self, positions: Sequence[int]) -> Tensor:
        """[logical blocks, 1, 1, tail] 1 where a key of the tail lies in the block."""
        first = self._num_blocks * BLOCK
        block = np.full(self._tail, -1)
        block[: len(positions) - first] = np.asarray(positions[first:]) // BLOCK
        last = int(block.max(initial=self._num_blocks))
        blocks = np.arange(self._num_blocks, last + 1)
        return torch.from_numpy((block == blocks[:, None]).astype(np.float32))[:, None, None]


def _add_in_order(parts: Tensor) -> Tensor:
    """Sum over the first dim, one after the other: as a product with ones, whose elements are one
    chain each. `Tensor.sum` adds in an order that depends on where in the tensor a row lies.
    """
    total: Tensor | None = None
    for some in torch.split(parts.flatten(1), MAX_TAIL):
        added = (torch.ones(ROW_TILE, len(some)) @ some)[0]
        total = added if total is None else total + added
    assert total is not None, "a row sees itself at least"
    return total.view(parts.shape[1:])


def _as_slice(rows: Sequence[int]) -> slice | Tensor:
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(list(rows))
