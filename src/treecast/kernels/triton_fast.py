"""Tree attention for speed, in Triton: a step's sequences, splits and heads in one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treecast.kernels.jit import blocks, tree
from treecast.kernels.plan import SegmentLayout
from treecast.kernels.scores import PLAIN, ScoreRule, check_on_device
from treecast.kernels.tables import (
    ITEM_COLUMNS,
    ROW_COLUMNS,
    PassTables,
    Tiling,
    build_tables,
    split_pages,
)
from treecast.prefix import PAGE_TOKENS

_MOST_LANES = 128
_FEWEST_LANES = 16
_MERGED_AT_ONCE = 16
_INTERPRETER_PROGRAMS = 8


@dataclass(frozen=True, slots=True)
class Launch:
    """A pass as it lies on the device.

    Attributes:
        table: int32, the words of `PassTables`.
        num_items: as in `PassTables`.
        num_rows: as in `PassTables`.
        lanes: query rows of one program: nodes of a tile times the heads that share a KV head.
    """

    table: Tensor
    num_items: int
    num_rows: int
    lanes: int

    @property
    def rows_at(self) -> int:
        return self.num_items * ITEM_COLUMNS

    @classmethod
    def of(cls, tables: PassTables, lanes: int, device: torch.device) -> Launch:
        """Copy tables to a device."""
        words = torch.from_numpy(tables.words).to(device)
        return cls(words, tables.num_items, tables.num_rows, lanes)


Planner = Callable[[int, int], Launch]
"""From heads per KV head, and KV heads, to a launch."""


def lanes_for(most_rows: int, group: int) -> int:
    """Query rows of a program, where a segment has `most_rows` nodes at most."""
    wanted = min(_MOST_LANES, next_power_of_2(most_rows * group))
    return max(_FEWEST_LANES, wanted, next_power_of_2(group))


def num_programs(device: torch.device) -> int:
    """Programs that fill a device once."""
    if device.type != "cuda":
        return _INTERPRETER_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def fast_tables(
    segments: Sequence[SegmentLayout], group: int, most_items: int, num_rows: int | None = None
) -> tuple[PassTables, int]:
    """Cut a pass into about `most_items` items; returns its tables, and the lanes of a program.

    Args:
        segments: as in `tables.build_tables`.
        group: query heads that share a KV head.
        most_items: items that fill the device once.
        num_rows: room for so many rows, and then for as many items as such passes can have: sizes
            depend on it alone. None for no more room than is needed.
    """
    most_rows = max(segment.num_rows for segment in segments) if num_rows is None else num_rows
    lanes = lanes_for(most_rows, group)
    tiling = Tiling(lanes // group, split_pages(segments, lanes // group, most_items))
    room = None if num_rows is None else most_items + num_rows
    return build_tables(segments, tiling, room, num_rows), lanes


class TritonFastAttention:
    """Fast attention of a packed pass over pages on a device; see `plan.LayerAttention`."""

    def __init__(self, plan: Planner) -> None:
        """`plan` is asked once for each shape of heads among the layers."""
        self._plan = plan
        self._launches: dict[tuple[int, int], Launch] = {}
        self._buffers: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    @classmethod
    def over(cls, segments: Sequence[SegmentLayout], device: torch.device) -> TritonFastAttention:
        """Attention of these segments."""

        def plan(group: int, kv_heads: int) -> Launch:
            most_items = -(-num_programs(device) // kv_heads)
            return Launch.of(*fast_tables(segments, group, most_items), device)

        return cls(plan)

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
        heads, kv_heads, value_dim = query.shape[0], key.shape[0], value.shape[-1]
        group = heads // kv_heads
        if (group, kv_heads) not in self._launches:
            self._launches[group, kv_heads] = self._plan(group, kv_heads)
        launch = self._launches[group, kv_heads]
        assert query.stride(-1) == 1, "a head's numbers lie side by side"
        write_new(launch.table, launch.rows_at, launch.num_rows, key, value, key_pool, value_pool)
        partial, logsums = self._buffers_of(launch, kv_heads, value_dim)
        block_key, block_value = block_dim(query.shape[-1]), block_dim(value_dim)
        tree.attend_items[(launch.num_items, kv_heads)](
            query,
            key_pool,
            value_pool,
            launch.table,
            partial,
            logsums,
            launch.rows_at,
            query.stride(0),
            query.stride(1),
            key_pool.stride(0),
            key_pool.stride(1),
            value_pool.stride(0),
            value_pool.stride(1),
            scaling,
            1.0 if rule.softcap is None else rule.softcap,
            0 if rule.window is None else rule.window,
            CAPPED=rule.softcap is not None,
            WINDOWED=rule.window is not None,
            GROUP=group,
            KEY_DIM=query.shape[-1],
            VALUE_DIM=value_dim,
            BLOCK_ROWS=launch.lanes,
            BLOCK_KEY=block_key,
            BLOCK_VALUE=block_value,
            PAGE=PAGE_TOKENS,
            ITEM_COLUMNS=ITEM_COLUMNS,
            ROW_COLUMNS=ROW_COLUMNS,
            num_warps=warps_for(launch.lanes),
            num_stages=stages_for(block_key),
        )
        tree.merge_items[(launch.num_rows, heads)](
            partial,
            logsums,
            launch.table,
            out,
            launch.rows_at,
            out.stride(0),
            out.stride(1),
            kv_heads,
            GROUP=group,
            VALUE_DIM=value_dim,
            BLOCK_ROWS=launch.lanes,
            BLOCK_VALUE=block_value,
            BLOCK_ITEMS=_MERGED_AT_ONCE,
            ROW_COLUMNS=ROW_COLUMNS,
            num_warps=4,
        )

    def _buffers_of(self, launch: Launch, kv_heads: int, value_dim: int) -> tuple[Tensor, Tensor]:
        """The items' weighted means and logs of sums; layers take turns with them."""
        shape = (launch.num_items, kv_heads, launch.lanes, value_dim)
        if shape not in self._buffers:
            partial = launch.table.new_empty(shape, dtype=torch.float32)
            logsums = launch.table.new_empty(shape[:-1], dtype=torch.float32)
            self._buffers[shape] = partial, logsums
        return self._buffers[shape]


def write_new(
    table: Tensor,
    rows_at: int,
    num_rows: int,
    key: Tensor,
    value: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
) -> None:
    """Put the rows' keys and values where the pass's table says."""
    for tensor in (key, value, key_pool, value_pool):
        assert tensor.stride(-1) == 1, "a head's numbers lie side by side"
    blocks.write_rows[(num_rows, key.shape[0])](
        key,
        value,
        key_pool,
        value_pool,
        table,
        rows_at,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        key_pool.stride(0),
        key_pool.stride(1),
        value_pool.stride(0),
        value_pool.stride(1),
        ROW_COLUMNS=ROW_COLUMNS,
        KEY_DIM=key.shape[-1],
        VALUE_DIM=value.shape[-1],
        BLOCK_KEY=block_dim(key.shape[-1]),
        BLOCK_VALUE=block_dim(value.shape[-1]),
        num_warps=1,
    )


def warps_for(lanes: int) -> int:
    """Four would spill registers where lanes are many (`treecast.bench.gpu.resources`)."""
    return 4 if lanes <= _FEWEST_LANES else 8


def stages_for(block_key: int) -> int:
    """Pages on their way at once, as shared memory allows."""
    return 2 if block_key > 128 else 3


def block_dim(dim: int) -> int:
    """Columns of a block that holds `dim`; matrix units take 16 at least."""
    return max(16, next_power_of_2(dim))


def next_power_of_2(count: int) -> int:
    """The smallest power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()
