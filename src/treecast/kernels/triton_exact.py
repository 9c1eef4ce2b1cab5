"""Exact tree attention in Triton; `jit.exact` says what makes it so.

The launch configuration (rows of a program, keys of a block, warps) is the same for every pass: the
compiled code, and with it the order of every sum, never depends on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treecast.kernels.jit import exact
from treecast.kernels.plan import SegmentLayout
from treecast.kernels.scores import PLAIN, ScoreRule, check_on_device
from treecast.kernels.tables import (
    ITEM_COLUMNS,
    ROW_COLUMNS,
    PassTables,
    Tiling,
    build_tables,
    count_items,
)
from treecast.kernels.triton_fast import Launch, Planner, block_dim, next_power_of_2, write_new
from treecast.prefix import PAGE_TOKENS

EXACT_LANES = 64
"""Query rows of a program; more only for models with more heads on one KV head."""

CHUNK_PAGES = 8
"""Pages whose sums are kept apart before they are merged: 512 positions."""

EXACT_WARPS = 8
EXACT_STAGES = 2


def exact_tiling(group: int) -> tuple[Tiling, int]:
    """How a pass is cut, and the lanes of a program: by the model's heads alone."""
    lanes = max(EXACT_LANES, next_power_of_2(group))
    return Tiling(lanes // group, CHUNK_PAGES, aligned=True), lanes


def exact_tables(
    segments: Sequence[SegmentLayout], group: int, num_rows: int | None = None
) -> tuple[PassTables, int]:
    """Lay a pass out; returns its tables, and the lanes of a program.

    With `num_rows` there is room for so many rows, and for items up to a power of two.
    """
    tiling, lanes = exact_tiling(group)
    room = None
    if num_rows is not None:
        room = next_power_of_2(max(1, count_items(segments, tiling)))
    return build_tables(segments, tiling, room, num_rows, paths=True), lanes


class TritonExactAttention:
    """Exact attention of a packed pass over pages on a device; see `plan.LayerAttention`."""

    def __init__(self, plan: Planner) -> None:
        """`plan` is asked once for each shape of heads among the layers."""
        self._plan = plan
        self._launches: dict[tuple[int, int], Launch] = {}

    @classmethod
    def over(cls, segments: Sequence[SegmentLayout], device: torch.device) -> TritonExactAttention:
        """Attention of these segments."""
        return cls(lambda group, _: Launch.of(*exact_tables(segments, group), device))

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
        check_on_device(rule)
        kv_heads, value_dim = key.shape[0], value.shape[-1]
        group = query.shape[0] // kv_heads
        if (group, kv_heads) not in self._launches:
            self._launches[group, kv_heads] = self._plan(group, kv_heads)
        launch = self._launches[group, kv_heads]
        assert query.stride(-1) == 1, "a head's numbers lie side by side"
        write_new(launch.table, launch.rows_at, launch.num_rows, key, value, key_pool, value_pool)
        shape = (max(1, launch.num_items), kv_heads, launch.lanes)
        sums = out.new_empty((*shape, value_dim), dtype=torch.float32)
        peaks, totals = out.new_empty((2, *shape), dtype=torch.float32)
        strides = [
            stride
            for tensor in (query, key_pool, value_pool)
            for stride in (tensor.stride(0), tensor.stride(1))
        ]
        numbers = (
            scaling,
            1.0 if rule.softcap is None else rule.softcap,
            0 if rule.window is None else rule.window,
        )
        fixed = {
            "CAPPED": rule.softcap is not None,
            "WINDOWED": rule.window is not None,
            "GROUP": group,
            "KEY_DIM": query.shape[-1],
            "VALUE_DIM": value_dim,
            "BLOCK_ROWS": launch.lanes,
            "BLOCK_KEY": block_dim(query.shape[-1]),
            "BLOCK_VALUE": block_dim(value_dim),
            "PAGE": PAGE_TOKENS,
            "ROW_COLUMNS": ROW_COLUMNS,
            "num_warps": EXACT_WARPS,
            "num_stages": EXACT_STAGES,
        }
        inputs = (query, key_pool, value_pool, launch.table, sums, peaks, totals)
        if launch.num_items:
            exact.fold_chunks[(launch.num_items, kv_heads)](
                *inputs, launch.rows_at, *strides, *numbers, ITEM_COLUMNS=ITEM_COLUMNS, **fixed
            )
        exact.finish_rows[(launch.num_rows, kv_heads)](
            *inputs,
            out,
            launch.rows_at,
            *strides,
            out.stride(0),
            out.stride(1),
            *numbers,
            CHUNK_PAGES=CHUNK_PAGES,
            **fixed,
        )
