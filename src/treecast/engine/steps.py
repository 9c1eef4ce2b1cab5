"""Packed passes on a device: padded to a few sizes, each of which is captured as a CUDA graph once.

A step of a few rows is hundreds of small kernels, and launching them one by one takes longer than
running them. A graph replays them all, but only with the sizes and addresses that it was captured
with. So a pass is padded to a *bucket*: its inputs go into buffers that stay where they are, and
what varies (which pages, which rows see which) is data in a table that the kernels read. Without a
device to capture on, the same code runs the same padded passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog
import torch
from torch import Tensor

from treecast.engine.bridge import KernelPass
from treecast.engine.kv_tensors import KVTensors
from treecast.engine.runner import Runner
from treecast.kernels.plan import LayerAttention, SegmentLayout
from treecast.kernels.tables import PassTables
from treecast.kernels.triton_exact import TritonExactAttention, exact_tables
from treecast.kernels.triton_fast import (
    Launch,
    Planner,
    TritonFastAttention,
    fast_tables,
    num_programs,
)

ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows that passes are padded to; larger ones are run as they are."""

_FEWEST_WORDS = 1024
MOST_GRAPHS = 64
"""Beyond, new sizes are run uncaptured."""

_log = structlog.get_logger()


class PagedAttention(Protocol):
    """One of the two kinds of numerics on a device."""

    def tables(
        self, layouts: Sequence[SegmentLayout], num_rows: int, group: int, kv_heads: int
    ) -> tuple[PassTables, int]:
        """A pass laid out with room for `num_rows`, and the lanes of a program."""

    def kernel(self, plan: Planner) -> LayerAttention:
        """Attention by launches that `plan` gives."""


@dataclass(frozen=True, slots=True)
class FastPaged:
    """Fast numerics; `programs` fill the device once."""

    programs: int

    def tables(
        self, layouts: Sequence[SegmentLayout], num_rows: int, group: int, kv_heads: int
    ) -> tuple[PassTables, int]:
        return fast_tables(layouts, group, -(-self.programs // kv_heads), num_rows)

    def kernel(self, plan: Planner) -> LayerAttention:
        return TritonFastAttention(plan)


class ExactPaged:
    """Exact numerics."""

    def tables(
        self, layouts: Sequence[SegmentLayout], num_rows: int, group: int, kv_heads: int
    ) -> tuple[PassTables, int]:
        return exact_tables(layouts, group, num_rows)

    def kernel(self, plan: Planner) -> LayerAttention:
        return TritonExactAttention(plan)


def paged_attention(exact: bool, device: torch.device) -> PagedAttention:
    """Attention of a device's passes."""
    return ExactPaged() if exact else FastPaged(num_programs(device))


@dataclass(frozen=True, slots=True)
class PassInput:
    """One packed pass.

    Attributes:
        plain: whether the model alone computes all rows. Adapters' rows differ from pass to pass,
            so a pass with some is neither captured nor a replay.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    wanted: Sequence[int]
    layouts: Sequence[SegmentLayout]
    plain: bool = True


@dataclass(frozen=True, slots=True)
class PassOutput:
    """Logits on the device, and what the host knows of them already.

    Attributes:
        logits: [wanted, vocab].
        likeliest: [wanted] each row's argmax, ties to the lowest id; -1 where the largest logit is
            not finite.
    """

    logits: Tensor
    likeliest: list[int]


class DeviceSteps:
    """A model's passes on a device, by bucket. One thread's, one pass at a time."""

    def __init__(
        self,
        runner: Runner,
        tensors: KVTensors,
        attention: PagedAttention,
        heads: tuple[int, int],
        device: torch.device,
        most_graphs: int = MOST_GRAPHS,
        captures: bool = True,
    ) -> None:
        """Run passes of `runner`.

        Args:
            heads: how many share a KV head, and KV heads; alike in all layers.
            captures: whether passes may be replayed; not where a host's thread moves weights.
        """
        self.captures = captures and device.type == "cuda"
        self._most_graphs = most_graphs
        self._runner = runner
        self._tensors = tensors
        self._attention = attention
        self._group, self._kv_heads = heads
        self._device = device
        self._steps: dict[tuple[int, int, int, int], _Step] = {}

    def run(self, given: PassInput) -> PassOutput:
        """Compute a pass. Waits for the device once, if any logits are wanted."""
        num_rows = padded_rows(len(given.tokens))
        tables, lanes = self._attention.tables(given.layouts, num_rows, self._group, self._kv_heads)
        words = _power_of_2(len(tables.words), _FEWEST_WORDS)
        key = (num_rows, tables.num_items, words, lanes)
        step = self._steps.get(key) if given.plain else None
        if step is None:
            step = _Step(self, key)
            if given.plain and len(self._steps) < self._most_graphs:
                self._steps[key] = step
        step.load(given, tables)
        logits, best = step.run(captured=given.plain and key in self._steps)
        count = len(given.wanted)
        if not count:
            return PassOutput(logits[:0], [])
        # Copied, as the next pass of this bucket writes where this one did.
        return PassOutput(logits[:count].clone(), best[:count].tolist())

    def compute(self, packed: Tensor, launch: Launch) -> tuple[Tensor, Tensor]:
        """Logits of the wanted rows, and their argmax or -1; no host synchronisation."""
        kernel = self._attention.kernel(lambda group, kv_heads: launch)
        tokens, positions, wanted = packed
        tree = KernelPass(kernel, self._tensors, launch.num_rows)
        logits = self._runner(tokens, positions, wanted, tree)
        return logits, likeliest(logits)

    @property
    def device(self) -> torch.device:
        return self._device


class _Step:
    """Buffers of one bucket, and its graph once captured."""

    def __init__(self, steps: DeviceSteps, key: tuple[int, int, int, int]) -> None:
        num_rows, num_items, num_words, lanes = key
        device = steps.device
        self._steps = steps
        self._num_rows = num_rows
        self._packed = _Staged((3, num_rows), torch.int64, device)
        self._table = _Staged((num_words,), torch.int32, device)
        self._launch = Launch(self._table.on_device, num_items, num_rows, lanes)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: tuple[Tensor, Tensor] | None = None
        self._capturable = steps.captures

    def load(self, given: PassInput, tables: PassTables) -> None:
        """Put a pass's inputs on the device. Rows behind the last are token 0 at position 0."""
        for line, values in enumerate((given.tokens, given.positions, given.wanted)):
            self._packed.on_host[line] = 0
            self._packed.on_host[line, : len(values)] = torch.tensor(values, dtype=torch.int64)
        self._table.on_host[: len(tables.words)] = torch.from_numpy(tables.words)
        self._packed.send()
        self._table.send()

    def run(self, captured: bool) -> tuple[Tensor, Tensor]:
        """Compute what was loaded. The second run of a size is captured, later ones are replays."""
        if self._graph is not None and self._outputs is not None:
            self._graph.replay()
            return self._outputs
        outputs = self._steps.compute(self._packed.on_device, self._launch)
        if captured and self._capturable:
            self._capture()
        return outputs

    def _capture(self) -> None:
        """Record the pass that has just run; its kernels are compiled and its libraries loaded."""
        torch.cuda.synchronize(self._steps.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = self._steps.compute(self._packed.on_device, self._launch)
        except RuntimeError as error:
            # A model that asks the device something midway, such as for its largest position.
            _log.warning("step.not_captured", rows=self._num_rows, error=str(error))
            self._capturable = False
            return
        self._graph, self._outputs = graph, outputs


class _Staged:
    """A tensor on the device, and a host's copy to fill and send without waiting."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._sent: torch.cuda.Event | None = None
        if self._pinned:
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._host = torch.zeros(shape, dtype=dtype, pin_memory=self._pinned)
        self.on_device = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def on_host(self) -> Tensor:
        """To be filled; waits until what was sent before has left."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._host

    def send(self) -> None:
        self.on_device.copy_(self._host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()


def likeliest(logits: Tensor) -> Tensor:
    """[rows] each row's argmax, ties to the lowest id; -1 where the largest is not finite."""
    peak, token = logits.float().max(-1)
    return torch.where(peak.isfinite(), token, -1)


def padded_rows(num_rows: int) -> int:
    """Rows that a pass of so many is computed with."""
    return next((size for size in ROW_BUCKETS if size >= num_rows), num_rows)


def _power_of_2(count: int, least: int) -> int:
    return max(least, 1 << (count - 1).bit_length())
