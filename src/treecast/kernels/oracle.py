"""Tree attention as its definition says it: the yardstick of the other kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treecast.kernels.plan import PLAIN, ScoreRule, SegmentLayout


class OracleAttention:
    """Every row gathers the keys of its own path. Slow; see `plan.LayerAttention`."""

    def __init__(self, segments: Sequence[SegmentLayout]) -> None:
        self._segments = segments

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
        group = query.shape[0] // key.shape[0]
        for segment in self._segments:
            rows = range(segment.first_row, segment.first_row + segment.num_rows)
            new = [
                segment.places[slot] for slot in range(segment.first_new_slot, segment.num_slots)
            ]
            key_pool[:, new] = key[:, rows].to(key_pool.dtype)
            value_pool[:, new] = value[:, rows].to(value_pool.dtype)
            for i, row in enumerate(rows):
                path = segment.path_slots(len(segment.parents) - segment.num_rows + i)
                if rule.window is not None:
                    path = path[-rule.window :]
                places = [segment.places[slot] for slot in path]
                keys = key_pool[:, places].float().repeat_interleave(group, 0)
                values = value_pool[:, places].float().repeat_interleave(group, 0)
                scores = torch.einsum("hd,hkd->hk", query[:, row].float() * scaling, keys)
                if rule.softcap is not None:
                    scores = torch.tanh(scores / rule.softcap) * rule.softcap
                out[row] = torch.einsum("hk,hkd->hd", scores.softmax(-1), values).to(out.dtype)
