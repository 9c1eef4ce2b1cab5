"""Any Hugging Face causal LM behind the engine's contract: paged KV, packed passes of trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from treecast.engine.base import LogitRows, ModelInfo, Segment
from treecast.engine.executor import Executor, LocalExecutor, PackedPass, PackedSegment
from treecast.engine.kv_pool import KVPool, PagedSequence, num_pages
from treecast.engine.loading import (
    Kernels,
    LoadOptions,
    SwapDType,
    describe,
    load_model,
    resolve_dtype,
)
from treecast.engine.lora_folder import count_numbers, read_adapter
from treecast.engine.memory import fitted
from treecast.engine.offload import RESIDENT, Offload
from treecast.engine.pooled import PooledEngine, paged
from treecast.engine.residency import ALL_RESIDENT, Offloaded
from treecast.engine.steps import PassOutput
from treecast.errors import InvalidRequest
from treecast.model_folder import check_model_dir
from treecast.prefix import PAGE_TOKENS
from treecast.settings import POOL_TOKENS, DType, KVDType, Numerics, Weights

NO_ADAPTERS: Mapping[str, Path | str] = MappingProxyType({})


class HFEngine(PooledEngine):
    """A causal LM and its KV pool; see `engine.base.Engine`."""

    def __init__(self, executor: Executor, info: ModelInfo, total_pages: int) -> None:
        """`executor` has room for so many pages."""
        super().__init__(info, KVPool(total_pages, executor))
        self._executor = executor

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        dtype: DType = "auto",
        numerics: Numerics = "exact",
        device: str = "cpu",
        pool_tokens: int | None = POOL_TOKENS,
        threads: int | None = None,
        kernels: Kernels = "auto",
        weights: Weights = "auto",
        adapters: Mapping[str, Path | str] = NO_ADAPTERS,
        offload: Offload = RESIDENT,
        swap_dtype: SwapDType = "same",
        kv_dtype: KVDType = "auto",
    ) -> HFEngine:
        """Read a model folder.

        Args:
            path: a folder as `from_pretrained` reads it.
            dtype: of weights and activations; see `loading.resolve_dtype` for "auto".
            numerics: `exact` (a row's bits do not depend on what is computed beside it), `fast`, or
                `oracle` (slow, for tests).
            device: where torch computes: `cpu`, `cuda`, or one of several such as `cuda:1`.
            pool_tokens: positions in the KV pool, rounded down to pages of 64; None for as many as
                free memory holds, see `memory.fitted`.
            threads: torch's number of threads, for the whole process; None leaves it.
            kernels: of attention; `auto` is Triton's on a GPU. Its interpreter runs them on CPU,
                slowly, for tests.
            weights: in what linear layers' weights are kept on CPU; `auto` is what loses nothing.
            adapters: folders of LoRA adapters, by the names that sequences ask for.
            offload: where weights lie that the device is not to hold.
            swap_dtype: what swapped-out KV is kept as; `int8` is lossy.
            kv_dtype: of the pool, see `kv_dtype`; `auto` is what attention computes in.

        Raises:
            ModelError: the folder is missing, no causal LM, or one that cannot be served; or an
                adapter is not served, does not fit the model, or is given with offload.
        """
        offload.check_adapters(adapters)
        folder = Path(path)
        check_model_dir(folder)
        options = LoadOptions(
            resolve_dtype(dtype, device),
            numerics,
            device,
            threads,
            kernels=kernels,
            weights=weights,
            offload=offload,
            swap_dtype=swap_dtype,
            kept_kv=kv_dtype,
        )
        numbers = sum(count_numbers(name, Path(where)) for name, where in adapters.items())
        options, pool_tokens = fitted(folder, options, pool_tokens, numbers)
        model = load_model(folder, options)
        loaded = [read_adapter(name, Path(where)) for name, where in adapters.items()]
        info = replace(
            describe(folder, model, options), adapters=tuple(one.adapter for one in loaded)
        )
        pages = pages_of(pool_tokens)
        offloads = offload.mode != "none"
        residency = Offloaded.of(model, folder, options) if offloads else ALL_RESIDENT
        executor = LocalExecutor.of(model, options, pages, loaded, residency)
        return cls(executor, info, pages)

    @property
    def moved_bytes(self) -> int:
        return self._executor.moved_bytes

    def check(self) -> None:
        self._executor.check()

    def close(self) -> None:
        self._executor.close()

    def forward(self, segments: Sequence[Segment]) -> list[LogitRows]:
        """Append the segments' rows and compute them in one packed pass.

        Blocks. Grows a reservation that is too small. If it raises, no rows were appended.

        Raises:
            InvalidRequest: an unknown token, a position beyond the context, a bad row index.
            InvalidTree: a parent does not precede its row.
            Overloaded: a reservation was too small and the pool is full.
        """
        sequences = [paged(segment.sequence) for segment in segments]
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
        packed = _pack(segments, sequences)
        if not packed.tokens:
            nothing = PassOutput(torch.empty(0, self._info.vocab_size), [])
            return [_Rows(nothing, slice(0)) for _ in segments]
        output = self._executor.run(packed)
        begins = accumulate((len(segment.wanted) for segment in segments), initial=0)
        return [_Rows(output, slice(*ends)) for ends in pairwise(begins)]


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


def _pack(segments: Sequence[Segment], sequences: Sequence[PagedSequence]) -> PackedPass:
    tokens: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    packed: list[PackedSegment] = []
    for segment, sequence in zip(segments, sequences, strict=True):
        wanted += [len(tokens) + row for row in segment.wanted]
        new = slice(sequence.num_rows - len(segment.tokens), None)
        positions += [sequence.length + depth for depth in sequence.depths[new]]
        tokens += segment.tokens
        if segment.tokens:
            packed.append(_pack_segment(len(segment.tokens), sequence))
    return PackedPass(tuple(tokens), tuple(positions), tuple(wanted), tuple(packed))


def _pack_segment(num_rows: int, sequence: PagedSequence) -> PackedSegment:
    pages = sequence.pages[: num_pages(sequence.num_slots)]
    return PackedSegment(
        num_rows, sequence.length, tuple(sequence.parents), tuple(pages), sequence.adapter
    )


def pages_of(pool_tokens: int) -> int:
    """Pages of a pool of so many positions: rounded down, but one at least."""
    return max(1, pool_tokens // PAGE_TOKENS)
