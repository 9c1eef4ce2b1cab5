"""Tree attention for speed: one masked pass per segment, free to add in any order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from treecast.kernels.plan import SegmentLayout
from treecast.kernels.scores import PLAIN, ScoreRule, weights_of


class FastAttention:
    """Scaled dot-product attention of each segment over its own keys; see `plan.LayerAttention`.

    The query heads that share a KV head are packed as rows of one matrix, so keys are not expanded.
    """

    def __init__(
        self, segments: Sequence[SegmentLayout], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._segments = [_FastSegment(segment, dtype, device) for segment in segments]

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
            segment.attend(query, key, value, key_pool, value_pool, scaling, out, rule)


class _FastSegment:
    def __init__(self, layout: SegmentLayout, dtype: torch.dtype, device: torch.device) -> None:
        self._rows = slice(layout.first_row, layout.first_row + layout.num_rows)
        self._num_rows = layout.num_rows
        self._keys: slice | Tensor
        self._new: slice | Tensor
        if layout.first_place is not None:
            end = layout.first_place + layout.num_slots
            self._keys = slice(layout.first_place, end)
            self._new = slice(end - layout.num_rows, end)
        else:
            self._keys = torch.tensor(layout.places, device=device)
            self._new = self._keys[layout.first_new_slot :]
        self._layout = layout
        self._dtype, self._device = dtype, device
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        scaling: float,
        out: Tensor,
        rule: ScoreRule,
    ) -> None:
        key_pool[:, self._new] = key[:, self._rows].to(key_pool.dtype)
        value_pool[:, self._new] = value[:, self._rows].to(value_pool.dtype)
        num_heads, kv_heads = query.shape[0], key.shape[0]
        packed = query[:, self._rows].reshape(1, kv_heads, -1, query.shape[-1])
        packed = packed.to(key_pool.dtype)
        keys, values = key_pool[:, self._keys], value_pool[:, self._keys]
        if rule.softcap is None and rule.bias is None and rule.sinks is None:
            mask = self._mask_of(num_heads // kv_heads, rule.window)
            attended = F.scaled_dot_product_attention(
                packed, keys[None], values[None], attn_mask=mask, scale=scaling
            )
        else:
            attended = self._weights(packed[0], keys, scaling, rule).to(values.dtype) @ values
        rows = attended.view(num_heads, self._num_rows, -1)
        out[self._rows] = rows.transpose(0, 1).to(out.dtype)

    def _weights(self, packed: Tensor, keys: Tensor, scaling: float, rule: ScoreRule) -> Tensor:
        """[KV heads, group * rows, slots] by a rule that the library's attention lacks."""
        scores = (packed @ keys.transpose(1, 2)).float().mul_(scaling)
        by_head = scores.view(len(keys), -1, self._num_rows, keys.shape[1])
        visible, positions = (
            torch.from_numpy(part).to(self._device)
            for part in (_visible(self._layout, rule.window), self._layout.positions())
        )
        return weights_of(by_head, visible, positions, rule).view_as(scores)

    def _mask_of(self, group: int, window: int | None) -> Tensor | None:
        """[group * rows, slots], the rows' mask repeated for each query head of a group.

        0 where a row sees a slot, else minus infinity; None if all see all.
        """
        if (group, window) not in self._masks:
            visible = _visible(self._layout, window)
            mask = np.where(visible, np.float32(0), np.float32(-np.inf))
            packed = torch.from_numpy(mask).to(self._device, self._dtype).repeat(group, 1)
            self._masks[group, window] = None if visible.all() else packed
        return self._masks[group, window]


def _visible(layout: SegmentLayout, window: int | None) -> NDArray[np.bool_]:
    """[rows, slots]: which slots each row sees."""
    visible = np.ones((layout.num_rows, layout.num_slots), dtype=np.bool_)
    visible[:, layout.length :] = layout.visible()
    return visible if window is None else visible & (_offsets(layout) > -window)


def _offsets(layout: SegmentLayout) -> NDArray[np.int64]:
    """[rows, slots] position of the slot minus that of the row."""
    positions = layout.positions()
    offsets: NDArray[np.int64] = positions - positions[layout.first_new_slot :, None]
    return offsets
