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

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from treecast.kernels.grouping import BLOCK, KeyGroup, group_rows
from treecast.kernels.plan import SegmentLayout
from treecast.kernels.scores import PLAIN, ScoreRule, cap

ROW_TILE = 16

NORM_COLUMNS = 16
"""Columns of ones behind every value, so that the product with the values sums the weights too."""


class ExactAttention:
    """Exact attention of a packed pass; see `plan.LayerAttention`.

    The pool must be float32, its values `NORM_COLUMNS` wider than the model's.
    """

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
        rule: ScoreRule = PLAIN,
    ) -> None:
        for segment in self._segments:
            segment.write(key, value, key_pool, value_pool)
            for group in segment.groups(rule.window):
                group.attend(query, key_pool, value_pool, scaling, out, rule)


class _ExactSegment:
    def __init__(self, layout: SegmentLayout) -> None:
        self._layout = layout
        self._key_groups = group_rows(layout)
        self._groups: dict[int | None, list[_ExactGroup]] = {}
        self._rows = slice(layout.first_row, layout.first_row + layout.num_rows)
        self._new: slice | Tensor
        if layout.first_place is not None:
            first = layout.first_place + layout.first_new_slot
            self._new = slice(first, first + layout.num_rows)
        else:
            self._new = torch.tensor(layout.places[layout.first_new_slot :])

    def groups(self, window: int | None) -> list[_ExactGroup]:
        """The segment's groups for the layers with this window."""
        if window not in self._groups:
            narrowed = (
                group if window is None else group.within(window) for group in self._key_groups
            )
            self._groups[window] = [_ExactGroup(self._layout, group) for group in narrowed]
        return self._groups[window]

    def write(self, key: Tensor, value: Tensor, key_pool: Tensor, value_pool: Tensor) -> None:
        value_dim = value.shape[-1]
        key_pool[:, self._new] = key[:, self._rows].to(key_pool.dtype)
        value_pool[:, self._new, :value_dim] = value[:, self._rows].to(value_pool.dtype)
        value_pool[:, self._new, value_dim:] = 1


class _ExactGroup:
    """Rows that attend to one list of keys, with its masks."""

    def __init__(self, layout: SegmentLayout, group: KeyGroup) -> None:
        self._rows = _as_slice(group.rows)
        self._num_rows = len(group.rows)
        self._num_blocks = group.num_blocks
        tail = len(group.slots) - self._num_blocks * BLOCK
        self._tail = _padded(tail)
        self._num_keys = self._num_blocks * BLOCK + self._tail
        self._keys = self._find_keys(layout, group)
        self._first_masked, self._mask = self._make_mask(group.visible)
        self._masks: dict[int, Tensor] = {}
        self._queries: dict[tuple[int, ...], Tensor] = {}
        self._tail_blocks = self._make_tail_blocks(group.positions)
        positions = np.zeros(self._num_keys, dtype=np.int64)
        positions[: len(group.positions)] = group.positions
        self._positions = torch.from_numpy(positions)

    def attend(
        self,
        query: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        scaling: float,
        out: Tensor,
        rule: ScoreRule,
    ) -> None:
        heads, kv_heads, value_dim = query.shape[0], key_pool.shape[0], out.shape[-1]
        group = heads // kv_heads
        padded = self._pad(query[:, self._rows], kv_heads).mul_(scaling)
        scores = self._scores(padded, key_pool[:, self._keys], group, rule)
        highest = scores.amax(-1, keepdim=True)
        parts = self._weighted_sums(scores.sub_(highest).exp_(), value_pool[:, self._keys])
        used = group * self._num_rows
        sums = add_in_order(parts)[:, :used]
        norm = sums[..., value_dim : value_dim + 1]
        if rule.sinks is not None:
            sinks = rule.sinks.view(kv_heads, group, 1).repeat_interleave(self._num_rows, 1)
            norm = norm + (sinks - highest[:, :used]).exp()
        attended = sums[..., :value_dim] / norm
        out[self._rows] = attended.view(heads, self._num_rows, -1).transpose(0, 1).to(out.dtype)

    def _pad(self, query: Tensor, kv_heads: int) -> Tensor:
        """[KV heads, padded rows, head dim] the rows of each KV head, in a buffer of ours."""
        heads, rows, head_dim = query.shape
        used = heads // kv_heads * rows
        shape = (kv_heads, _padded(used), head_dim)
        if shape not in self._queries:
            self._queries[shape] = torch.zeros(shape)
        buffer = self._queries[shape]
        grouped = (kv_heads, heads // kv_heads, rows, head_dim)
        buffer[:, :used].view(grouped).copy_(query.view(grouped))
        return buffer

    def _scores(self, query: Tensor, keys: Tensor, group: int, rule: ScoreRule) -> Tensor:
        """[KV heads, padded rows, keys] scores, minus infinity where a row does not see a key."""
        scores = torch.bmm(query, keys.transpose(1, 2))
        if rule.softcap is not None:
            cap(scores, rule.softcap)
        if rule.bias is not None:
            used = scores[:, : group * self._num_rows]
            by_head = used.view(-1, group, self._num_rows, self._num_keys)
            by_head += rule.bias(self._positions).view(-1, group, 1, self._num_keys)
        mask = self._mask_of(group, query.shape[1])
        if mask is not None:
            scores[:, :, self._first_masked :] += mask
        return scores

    def _weighted_sums(self, weights: Tensor, values: Tensor) -> Iterable[Tensor]:
        """[KV heads, padded rows, value dim + norm columns] of each logical block, in order."""
        kv_heads, rows, _ = weights.shape
        split = self._num_blocks * BLOCK
        if split:
            lead = weights[:, :, :split].reshape(kv_heads, rows, self._num_blocks, BLOCK)
            lead = lead.transpose(1, 2).reshape(-1, rows, BLOCK)
            blocks = values[:, :split].reshape(kv_heads * self._num_blocks, BLOCK, -1)
            product = torch.bmm(lead, blocks).view(kv_heads, self._num_blocks, rows, -1)
            yield from product.unbind(1)
        tail, ends = weights[:, :, split:], values[:, split:]
        if len(self._tail_blocks) == 1:
            yield torch.bmm(tail, ends)
        else:
            for block in self._tail_blocks:
                yield torch.bmm(tail * block, ends)

    def _find_keys(self, layout: SegmentLayout, group: KeyGroup) -> slice | Tensor:
        """Places of the keys, filled up to whole tiles with keys that nobody sees."""
        first = layout.first_place
        if first is not None and isinstance(group.slots, range):
            first += group.slots.start
            return slice(first, first + self._num_keys)
        places = [layout.places[slot] for slot in group.slots]
        return torch.tensor(places + places[:1] * (self._num_keys - len(places)))

    def _make_mask(self, visible: np.ndarray) -> tuple[int, Tensor | None]:
        """The first key that some row does not see, and [rows, keys from there on] masks.

        0 for a visible key, else minus infinity.
        """
        hidden = np.ones((len(visible), self._num_keys), dtype=np.bool_)
        hidden[:, : visible.shape[1]] = ~visible
        columns = hidden.any(0)
        if not columns.any():
            return self._num_keys, None
        first = int(columns.argmax())
        mask = np.zeros((len(visible), self._num_keys - first), dtype=np.float32)
        mask[hidden[:, first:]] = -np.inf
        return first, torch.from_numpy(mask)

    def _mask_of(self, group: int, padded_rows: int) -> Tensor | None:
        if self._mask is None:
            return None
        if group not in self._masks:
            mask = torch.zeros(padded_rows, self._mask.shape[1])
            mask[: group * self._num_rows] = self._mask.repeat(group, 1)
            self._masks[group] = mask
        return self._masks[group]

    def _make_tail_blocks(self, positions: np.ndarray) -> list[Tensor]:
        """For each logical block that the tail touches: [tail] 1 where a key lies in it."""
        tail = positions[self._num_blocks * BLOCK :] // BLOCK
        blocks = np.full(self._tail, -1)
        blocks[: len(tail)] = tail
        return [torch.from_numpy((blocks == b).astype(np.float32)) for b in np.unique(tail)]


def add_in_order(parts: Iterable[Tensor]) -> Tensor:
    """The sum of tensors, added one after the other; the first is written to.

    `Tensor.sum` adds in an order that depends on where in the tensor a row lies.
    """
    rest = iter(parts)
    total = next(rest)
    for part in rest:
        total += part
    return total


def _padded(rows: int) -> int:
    return -(-rows // ROW_TILE) * ROW_TILE


def _as_slice(rows: Sequence[int]) -> slice | Tensor:
    if list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(list(rows))
