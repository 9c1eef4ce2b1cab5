"""Tree attention as its definition says it: the yardstick of the other kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treecast.kernels.plan import SegmentLayout
from treecast.kernels.scores import PLAIN, ScoreRule


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
                places = [segment.places[slot] for slot in path[-(rule.window or len(path)) :]]
                keys = key_pool[:, places].float().repeat_interleave(group, 0)
                values = value_pool[:, places].float().repeat_interleave(group, 0)
                scores = torch.einsum("hd,hkd->hk", query[:, row].float() * scaling, keys)
                weights = _softmax(scores, rule, len(path))
                out[row] = torch.einsum("hk,hkd->hd", weights, values).to(out.dtype)


def _softmax(scores: Tensor, rule: ScoreRule, path_length: int) -> Tensor:
    """[heads, keys] scores of one row's last keys to weights."""
    if rule.softcap is not None:
        scores = rule.softcap * (scores / rule.softcap).tanh()
    if rule.bias is not None:
        scores = scores + rule.bias(torch.arange(path_length)[-scores.shape[1] :])
    if rule.sinks is None:
        return scores.softmax(-1)
    return torch.cat((scores, rule.sinks[:, None]), 1).softmax(-1)[:, :-1]
