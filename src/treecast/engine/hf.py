"""Any Hugging Face causal LM behind the engine's contract: paged KV, packed passes of trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treecast import checkpoints
from treecast.engine.base import KVSequence, LogitRows, ModelInfo, PoolUsage, Segment
from treecast.engine.bridge import KernelPass
from treecast.engine.kv_pool import PAGE_TOKENS, KVPool, PagedSequence
from treecast.engine.kv_tensors import KVTensors, LayerShape
from treecast.engine.loading import (
    DType,
    Kernels,
    LoadOptions,
    Numerics,
    describe,
    load_model,
    num_layers,
)
from treecast.engine.runner import Runner, choose_runner, layer_shapes
from treecast.engine.steps import DeviceSteps, PassInput, PassOutput, paged_attention
from treecast.errors import InvalidRequest, ModelError
from treecast.kernels.exact import NORM_COLUMNS, ExactAttention
from treecast.kernels.fast import FastAttention
from treecast.kernels.oracle import OracleAttention
from treecast.kernels.plan import LayerAttention, SegmentLayout

DEFAULT_POOL_TOKENS = 16384


class HFEngine:
    """A causal LM and its KV pool; see `engine.base.Engine`."""

    def __init__(
        self,
        runner: Runner,
        shapes: Sequence[LayerShape],
        info: ModelInfo,
        options: LoadOptions,
        pool_tokens: int,
    ) -> None:
        if options.numerics == "exact" and not options.uses_triton:
            shapes = [replace(s, value_dim=s.value_dim + NORM_COLUMNS) for s in shapes]
        num_pages = max(1, pool_tokens // PAGE_TOKENS)
        self._device = torch.device(options.device)
        self._tensors = KVTensors(shapes, num_pages * PAGE_TOKENS, options.kv_dtype, self._device)
        self._pool = KVPool(num_pages, self._tensors)
        self._runner = runner
        self._info = info
        self._options = options
        self._steps = self._device_steps(shapes) if options.uses_triton else None

    def _device_steps(self, shapes: Sequence[LayerShape]) -> DeviceSteps:
        heads = {(shape.group, shape.kv_heads) for shape in shapes}
        if len(heads) > 1:
            raise ModelError(
                f"the model's layers have {len(heads)} shapes of heads; kernels on a device take 1"
            )
        exact = self._options.numerics == "exact"
        attention = paged_attention(exact, self._device)
        return DeviceSteps(self._runner, self._tensors, attention, heads.pop(), self._device)

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        dtype: DType = "bfloat16",
        numerics: Numerics = "exact",
        device: str = "cpu",
        pool_tokens: int = DEFAULT_POOL_TOKENS,
        threads: int | None = None,
        kernels: Kernels = "auto",
    ) -> HFEngine:
        """Read a model folder.

        Args:
            path: a folder as `from_pretrained` reads it.
            dtype: of weights and activations.
            numerics: `exact` (a row's bits do not depend on what is computed beside it), `fast`, or
                `oracle` (slow, for tests).
            device: where torch computes: `cpu`, `cuda`, or one of several such as `cuda:1`.
            pool_tokens: positions in the KV pool, rounded down to pages of 64.
            threads: torch's number of threads, for the whole process; None leaves it.
            kernels: of attention; `auto` is Triton's on a GPU. Its interpreter runs them on CPU,
                slowly, for tests.

        Raises:
            ModelError: the folder is missing, no causal LM, or one that cannot be served.
        """
        folder = Path(path)
        checkpoints.check_model_dir(folder)
        options = LoadOptions(dtype, numerics, device, threads, kernels)
        model = load_model(folder, options)
        info = describe(folder, model, options)
        runner = choose_runner(model, options.row_layers())
        shapes = layer_shapes(runner, num_layers(model), torch.device(device))
        return cls(runner, shapes, info, options, pool_tokens)

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def usage(self) -> PoolUsage:
        return self._pool.usage

    def allocate(self, capacity: int) -> KVSequence:
        return self._pool.allocate(capacity)

    def reserve(self, sequence: KVSequence, capacity: int) -> None:
        self._pool.reserve(_paged(sequence), capacity)

    def fork(self, sequence: KVSequence, length: int, capacity: int) -> KVSequence:
        return self._pool.fork(_paged(sequence), length, capacity)

    def truncate(self, sequence: KVSequence, length: int) -> None:
        self._pool.truncate(_paged(sequence), length)

    def trim(self, sequence: KVSequence) -> None:
        self._pool.trim(_paged(sequence))

    def free(self, sequence: KVSequence) -> None:
        self._pool.free(_paged(sequence))

    def commit(self, sequence: KVSequence, path: Sequence[int], keep: Sequence[int] = ()) -> None:
        self._pool.commit(_paged(sequence), path, keep)

    def contents(self, sequence: KVSequence) -> list[Tensor]:
        """[planes, committed positions, dim] the sequence's keys and values: for comparisons."""
        paged = _paged(sequence)
        return self._tensors.read(paged.places(0, paged.length))

    def forward(self, segments: Sequence[Segment]) -> list[LogitRows]:
        """Append the segments' rows and compute them in one packed pass.

        Blocks. Grows a reservation that is too small. If it raises, no rows were appended.

        Raises:
            InvalidRequest: an unknown token, a position beyond the context, a bad row index.
            InvalidTree: a parent does not precede its row.
            Overloaded: a reservation was too small and the pool is full.
        """
        sequences = [_paged(segment.sequence) for segment in segments]
        if len({id(sequence) for sequence in sequences}) < len(sequences):
            raise ValueError("a sequence may have one segment in a pass")
        before = [sequence.num_rows for sequence in sequences]
        try:
            for segment, sequence in zip(segments, sequences, strict=True):
                self._append(segment, sequence)
            return self._compute(segments, sequences)
        except BaseException:
            for sequence, num_rows in zip(sequences, before, strict=True):
                self._pool.drop_rows(sequence, num_rows)
            raise

    def _append(self, segment: Segment, sequence: PagedSequence) -> None:
        _check_segment(segment, self._info.vocab_size)
        self._pool.append(sequence, segment.parents)
        last = sequence.length + max(sequence.depths, default=-1)
        if last >= self._info.context_tokens:
            raise InvalidRequest(
                f"position {last} is beyond the context of {self._info.context_tokens} tokens"
            )

    def _compute(
        self, segments: Sequence[Segment], sequences: Sequence[PagedSequence]
    ) -> list[LogitRows]:
        layouts = _layouts(segments, sequences)
        tokens = [token for segment in segments for token in segment.tokens]
        positions = [
            sequence.length + depth
            for segment, sequence in zip(segments, sequences, strict=True)
            for depth in sequence.depths[sequence.num_rows - len(segment.tokens) :]
        ]
        wanted = [
            layout.first_row + row
            for segment, layout in zip(segments, layouts, strict=True)
            for row in segment.wanted
        ]
        if not tokens:
            nothing = PassOutput(torch.empty(0, self._info.vocab_size), [])
            return [_Rows(nothing, slice(0)) for _ in segments]
        there = [layout for layout in layouts if layout.num_rows]
        output = self._run(PassInput(tokens, positions, wanted, there))
        begins = list(accumulate((len(segment.wanted) for segment in segments), initial=0))
        return [_Rows(output, slice(*ends)) for ends in pairwise(begins)]

    def _kernel(self, layouts: Sequence[SegmentLayout]) -> LayerAttention:
        if self._options.numerics == "exact":
            return ExactAttention(layouts)
        if self._options.numerics == "oracle":
            return OracleAttention(layouts)
        return FastAttention(layouts, self._options.kv_dtype, self._device)

    def _run(self, given: PassInput) -> PassOutput:
        self._tensors.settle()
        with torch.inference_mode():
            if self._steps is not None:
                return self._steps.run(given)
            return PassOutput(self._run_layouts(given), [])

    def _run_layouts(self, given: PassInput) -> Tensor:  # [wanted, vocab]
        tokens, positions = list(given.tokens), list(given.positions)
        tree = KernelPass(self._kernel(given.layouts), self._tensors, len(tokens))
        if len(tokens) < self._options.min_rows:
            tokens, positions = tokens * 2, positions * 2
        packed = torch.tensor((tokens, positions), device=self._device)
        rows = torch.tensor(given.wanted, dtype=torch.long, device=self._device)
        return self._runner(packed[0], packed[1], rows, tree)


class _Rows:
    """Logits of a segment; a row becomes float32 numpy when it is asked for."""

    def __init__(self, output: PassOutput, rows: slice) -> None:
        self._logits = output.logits[rows]
        self._likeliest = output.likeliest[rows]

    def __len__(self) -> int:
        return self._logits.shape[0]

    def __getitem__(self, row: int, /) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self._logits[row].float().cpu().numpy()
        return values

    def likeliest(self, row: int, /) -> int | None:
        """The row's argmax, ties to the lowest id, where the device has found it; else None."""
        known = self._likeliest and self._likeliest[row] >= 0
        return self._likeliest[row] if known else None


def _paged(sequence: KVSequence) -> PagedSequence:
    if not isinstance(sequence, PagedSequence):
        raise ModelError(f"a {type(sequence).__name__} is no sequence of this engine")
    return sequence


def _check_segment(segment: Segment, vocab_size: int) -> None:
    count = len(segment.tokens)
    if len(segment.parents) != count:
        raise InvalidRequest(f"{count} tokens have {len(segment.parents)} parents")
    unknown = [token for token in segment.tokens if not 0 <= token < vocab_size]
    if unknown:
        raise InvalidRequest(f"token {unknown[0]} is unknown; the vocabulary has {vocab_size}")
    outside = [row for row in segment.wanted if not 0 <= row < count]
    if outside:
        raise InvalidRequest(f"row {outside[0]} is wanted; the segment has {count}")


def _layouts(
    segments: Sequence[Segment], sequences: Sequence[PagedSequence]
) -> list[SegmentLayout]:
    layouts: list[SegmentLayout] = []
    first_row = 0
    for segment, sequence in zip(segments, sequences, strict=True):
        in_use = (sequence.num_slots - 1) // PAGE_TOKENS + 1
        run = sequence.pages[:in_use]
        together = run == list(range(run[0], run[0] + in_use)) if run else False
        layouts.append(
            SegmentLayout(
                first_row=first_row,
                num_rows=len(segment.tokens),
                length=sequence.length,
                parents=tuple(sequence.parents),
                first_place=run[0] * PAGE_TOKENS if together else None,
                places=sequence.places(0, sequence.num_slots),
            )
        )
        first_row += len(segment.tokens)
    return layouts
