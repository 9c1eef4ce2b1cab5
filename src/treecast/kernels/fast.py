"""Tree attention for speed: one masked pass per segment, free to add in any order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from treecast.kernels.plan import SegmentLayout


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
    ) -> None:
        for segment in self._segments:
            segment.attend(query, key, value, key_pool, value_pool, scaling, out)


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
        self._mask = _mask(layout, dtype, device)
        self._masks: dict[int, Tensor] = {}

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_pool: Tensor,
        value_pool: Tensor,
        scaling: float,
        out: Tensor,
    ) -> None:
        key_pool[:, self._new] = key[:, self._rows].to(key_pool.dtype)
        value_pool[:, self._new] = value[:, self._rows].to(value_pool.dtype)
        num_heads, kv_heads = query.shape[0], key.shape[0]
        packed = query[:, self._rows].reshape(1, kv_heads, -1, query.shape[-1])
        attended = F.scaled_dot_product_attention(
            packed.to(key_pool.dtype),
            key_pool[:, self._keys][None],
            value_pool[:, self._keys][None],
            attn_mask=self._mask_of(num_heads // kv_heads),
            scale=scaling,
        )
        rows = attended.view(num_heads, self._num_rows, -1)
        out[self._rows] = rows.transpose(0, 1).to(out.dtype)

    def _mask_of(self, group: int) -> Tensor | None:
        """[group * rows, slots], the rows' mask repeated for each query head of a group."""
        if self._mask is None:
            return None
        if group not in self._masks:
            self._masks[group] = self._mask.repeat(group, 1)
        return self._masks[group]


def _mask(layout: SegmentLayout, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """[rows, slots] 0 where a row sees a slot, else minus infinity; None if all see all."""
    visible = layout.visible()
    if visible.all():
        return None
    mask = np.zeros((layout.num_rows, layout.num_slots), dtype=np.float32)
    mask[:, layout.length :][~visible] = -np.inf
    return torch.from_numpy(mask).to(device, dtype)
