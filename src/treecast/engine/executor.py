"""What is computed of a packed pass, apart from who decides where sequences lie."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from treecast.engine import lora
from treecast.engine.bridge import KernelPass, TreePass
from treecast.engine.kv_stored import StoredKV, StoredPass
from treecast.engine.kv_tensors import KVTensors, LayerShape
from treecast.engine.loading import LoadOptions, num_layers
from treecast.engine.residency import ALL_RESIDENT, Residency
from treecast.engine.runner import Runner, choose_runner, layer_shapes
from treecast.engine.steps import (
    DeviceSteps,
    PassInput,
    PassOutput,
    padded_rows,
    paged_attention,
)
from treecast.errors import EngineLost, ModelError
from treecast.kernels.exact import NORM_COLUMNS, ExactAttention
from treecast.kernels.fast import FastAttention
from treecast.kernels.oracle import OracleAttention
from treecast.kernels.plan import LayerAttention, SegmentLayout
from treecast.prefix import PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class PackedSegment:
    """Rows of one sequence in a packed pass.

    Attributes:
        num_rows: rows that the pass computes, the last of `parents`.
        length: committed positions.
        parents: [rows, old and new] as in `engine.base.Segment`.
        pages: in slot order, those in use.
        adapter: that the rows are computed with; empty for none.
    """

    num_rows: int
    length: int
    parents: tuple[int, ...]
    pages: tuple[int, ...]
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class PackedPass:
    """All that a pass is computed from, besides the model and the pool's contents.

    Attributes:
        tokens, positions: [rows].
        wanted: rows whose logits are needed, ascending.
        segments: in the order of their rows; none is empty.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    wanted: tuple[int, ...]
    segments: tuple[PackedSegment, ...]

    @property
    def adapters(self) -> list[str]:
        """[rows] of each row, empty for none; nothing at all if no row has one."""
        if not any(segment.adapter for segment in self.segments):
            return []
        return [one.adapter for one in self.segments for _ in range(one.num_rows)]


class Executor(Protocol):
    """A model and the contents of its KV pool; also a `kv_pool.Storage`."""

    @property
    def position_bytes(self) -> int:
        """See `kv_pool.Storage.position_bytes`."""

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See `kv_pool.Storage.copy`."""

    def save(self, key: int, places: Sequence[int]) -> None:
        """See `kv_pool.Storage.save`."""

    def load(self, key: int, places: Sequence[int]) -> None:
        """See `kv_pool.Storage.load`."""

    def forget(self, key: int) -> None:
        """See `kv_pool.Storage.forget`."""

    def run(self, packed: PackedPass) -> PassOutput:
        """Compute a pass; its keys and values are in the pool then. Blocks.

        Raises:
            EngineLost: the pool does not hold any more what its sequences believe, or the device
                computes nothing any more.
        """

    @property
    def moved_bytes(self) -> int:
        """See `engine.base.Engine.moved_bytes`."""

    def check(self) -> None:
        """See `engine.base.Engine.check`."""

    def close(self) -> None:
        """See `engine.base.Engine.close`."""


class LocalExecutor:
    """The model, or a group's share of it, in this process."""

    def __init__(
        self,
        runner: Runner,
        shapes: Sequence[LayerShape],
        options: LoadOptions,
        num_pages: int,
        adapter_rows: lora.AdapterRows | None = None,
        residency: Residency = ALL_RESIDENT,
    ) -> None:
        """`adapter_rows` are those that the runner's adapted layers look at."""
        self._residency = residency
        self._norm_columns = 0
        if options.numerics == "exact" and not options.uses_triton:
            self._norm_columns = NORM_COLUMNS
        self._device = torch.device(options.device)
        self._tensors = self._pool(shapes, num_pages * PAGE_TOKENS, options)
        self._runner = runner
        self._adapter_rows = adapter_rows or lora.AdapterRows()
        self._options = options
        self._steps = self._device_steps(shapes) if options.uses_triton else None

    def _pool(
        self, shapes: Sequence[LayerShape], num_places: int, options: LoadOptions
    ) -> KVTensors | StoredKV:
        if options.widens_kv:
            return StoredKV(shapes, num_places, options.kv_format, self._device)
        wide = [replace(s, value_dim=s.value_dim + self._norm_columns) for s in shapes]
        lossy_swap = options.swap_dtype == "int8"
        return KVTensors(wide, num_places, options.kv_dtype, self._device, lossy_swap)

    def _device_steps(self, shapes: Sequence[LayerShape]) -> DeviceSteps:
        assert isinstance(self._tensors, KVTensors), "refused with the options"
        heads = {(shape.group, shape.kv_heads) for shape in shapes}
        if len(heads) > 1:
            raise ModelError(
                f"the model's layers have {len(heads)} shapes of heads; kernels on a device take 1"
            )
        attention = paged_attention(self._options.numerics == "exact", self._device)
        return DeviceSteps(
            self._runner,
            self._tensors,
            attention,
            heads.pop(),
            self._device,
            captures=not self._residency.moves,
        )

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        options: LoadOptions,
        num_pages: int,
        adapters: Sequence[lora.AdapterWeights] = (),
        residency: Residency = ALL_RESIDENT,
    ) -> LocalExecutor:
        """Of a loaded model, which is changed or no longer needed.

        Raises:
            ModelError: some layer does not reach our attention, or an adapter does not fit.
        """
        rows, device = lora.AdapterRows(), torch.device(options.device)
        lora.attach(model, adapters)
        layers, thin = options.row_layers(), options.lossless.row_layers()
        runner = choose_runner(model, lora.with_adapters(layers, thin, rows), residency)
        residency.done()
        shapes = layer_shapes(runner, range(num_layers(model)), device)
        for one in adapters:  # a layer that cannot tell its rows is found now, not in a request
            with rows.marked([one.adapter.name] * 2, 2, device):
                layer_shapes(runner, range(len(shapes)), device)
        return cls(runner, shapes, options, num_pages, rows, residency)

    @property
    def position_bytes(self) -> int:
        return self._tensors.position_bytes

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self._tensors.copy(sources, targets)

    def save(self, key: int, places: Sequence[int]) -> None:
        self._tensors.save(key, places)

    def load(self, key: int, places: Sequence[int]) -> None:
        self._tensors.load(key, places)

    def forget(self, key: int) -> None:
        self._tensors.forget(key)

    def run(self, packed: PackedPass) -> PassOutput:
        try:
            return self._run(packed)
        except torch.AcceleratorError as error:  # every later call to the device would fail too
            raise EngineLost(f"the device {self._device} is lost: {error}") from error

    def _run(self, packed: PackedPass) -> PassOutput:
        self._settle()
        layouts = _layouts(packed.segments)
        with torch.inference_mode():
            if self._steps is None:
                return PassOutput(self._run_here(packed, layouts), [])
            adapters = packed.adapters
            given = PassInput(
                packed.tokens, packed.positions, packed.wanted, layouts, plain=not adapters
            )
            with self._marked(adapters, padded_rows(len(packed.tokens))):
                return self._steps.run(given)

    def _settle(self) -> None:
        """Do the moves that wait; some are done and others lost if one fails."""
        try:
            self._tensors.settle()
        except EngineLost:
            raise
        except Exception as error:
            raise EngineLost(f"moves within the KV pool failed: {error!r}") from error

    def _run_here(
        self, packed: PackedPass, layouts: Sequence[SegmentLayout]
    ) -> Tensor:  # [wanted, vocab]
        tokens, positions = packed.tokens, packed.positions
        tree = self._tree_pass(layouts, len(tokens))
        missing = self._options.filled(len(tokens)) - len(tokens)
        tokens, positions = tokens + tokens[:1] * missing, positions + positions[:1] * missing
        rows = torch.tensor((tokens, positions), device=self._device)
        wanted = torch.tensor(packed.wanted, dtype=torch.long, device=self._device)
        with self._marked(packed.adapters, len(tokens)):
            return self._runner(rows[0], rows[1], wanted, tree)

    def _marked(self, adapters: Sequence[str], num_rows: int) -> AbstractContextManager[None]:
        return self._adapter_rows.marked(adapters, num_rows, self._device)

    def _tree_pass(self, layouts: Sequence[SegmentLayout], num_rows: int) -> TreePass:
        tensors = self._tensors
        if isinstance(tensors, KVTensors):
            return KernelPass(self._kernel(layouts), tensors, num_rows)
        return StoredPass(
            tensors, layouts, self._kernel, self._options.kv_dtype, self._norm_columns
        )

    def check(self) -> None:
        """There is nobody to lose."""

    @property
    def moved_bytes(self) -> int:
        return self._residency.moved_bytes

    def close(self) -> None:
        self._residency.close()

    def _kernel(self, layouts: Sequence[SegmentLayout]) -> LayerAttention:
        if self._options.numerics == "exact":
            return ExactAttention(layouts)
        if self._options.numerics == "oracle":
            return OracleAttention(layouts)
        return FastAttention(layouts, self._options.kv_dtype, self._device)


def _layouts(segments: Sequence[PackedSegment]) -> list[SegmentLayout]:
    layouts: list[SegmentLayout] = []
    first_row = 0
    for segment in segments:
        layouts.append(_layout(segment, first_row))
        first_row += segment.num_rows
    return layouts


def _layout(segment: PackedSegment, first_row: int) -> SegmentLayout:
    pages = segment.pages
    together = pages == tuple(range(pages[0], pages[0] + len(pages)))
    num_slots = segment.length + len(segment.parents)
    return SegmentLayout(
        first_row=first_row,
        num_rows=segment.num_rows,
        length=segment.length,
        parents=segment.parents,
        first_place=pages[0] * PAGE_TOKENS if together else None,
        places=[page * PAGE_TOKENS + at for page in pages for at in range(PAGE_TOKENS)][:num_slots],
    )
