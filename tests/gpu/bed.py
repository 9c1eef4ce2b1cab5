"""Packed passes to try kernels on: sequences at scattered pages, new rows, and the definition."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treecast.kernels.oracle import OracleAttention
from treecast.kernels.plan import LayerAttention, SegmentLayout
from treecast.kernels.scores import PLAIN, ScoreRule
from treecast.prefix import PAGE_TOKENS


@dataclass(frozen=True)
class Text:
    """What one sequence brings to a pass: `num_rows` None computes all its uncommitted rows."""

    length: int
    parents: Sequence[int]
    num_rows: int | None = None


@dataclass(frozen=True)
class Heads:
    """Shape of a layer's attention."""

    kv_heads: int
    group: int
    dim: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


def chain(count: int) -> list[int]:
    return list(range(-1, count - 1))


def random_tree(count: int, seed: int) -> list[int]:
    """A tree of that many rows; deep and bushy parts both occur."""
    rng = random.Random(seed)
    return [rng.choice([row - 1, rng.randint(-1, row - 1)]) if row else -1 for row in range(count)]


def layouts_of(sequences: Sequence[Text], seed: int = 0) -> list[SegmentLayout]:
    """The sequences as a pass, their pages shuffled among one another."""
    counts = [-(-(s.length + len(s.parents)) // PAGE_TOKENS) for s in sequences]
    pages = list(range(1, 1 + sum(counts)))
    random.Random(seed).shuffle(pages)
    layouts, first_row = [], 0
    for sequence, count in zip(sequences, counts, strict=True):
        own, pages = pages[:count], pages[count:]
        slots = range(sequence.length + len(sequence.parents))
        places = [own[slot // PAGE_TOKENS] * PAGE_TOKENS + slot % PAGE_TOKENS for slot in slots]
        rows = len(sequence.parents) if sequence.num_rows is None else sequence.num_rows
        layouts.append(
            SegmentLayout(first_row, rows, sequence.length, sequence.parents, None, places)
        )
        first_row += rows
    return layouts


@dataclass(frozen=True)
class Pass:
    """Inputs of one layer in a pass. What nobody may read is NaN."""

    layouts: Sequence[SegmentLayout]
    heads: Heads
    query: Tensor
    key: Tensor
    value: Tensor
    key_pool: Tensor
    value_pool: Tensor

    @classmethod
    def random(
        cls,
        layouts: Sequence[SegmentLayout],
        heads: Heads,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Pass:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        rows = sum(layout.num_rows for layout in layouts)
        num_places = (
            1 + max(max(layout.places) for layout in layouts) // PAGE_TOKENS
        ) * PAGE_TOKENS
        pools = []
        for _ in range(2):
            pool = torch.full((heads.kv_heads, num_places, heads.dim), torch.nan, dtype=dtype)
            for layout in layouts:
                there = list(layout.places[: layout.first_new_slot])
                pool[:, there] = draw(heads.kv_heads, len(there), heads.dim)
            pools.append(pool)
        # Rows lie as a projection leaves them: heads inside rows.
        query = draw(rows, heads.heads, heads.dim).transpose(0, 1)
        key = draw(rows, heads.kv_heads, heads.dim).transpose(0, 1)
        value = draw(rows, heads.kv_heads, heads.dim).transpose(0, 1)
        return cls(layouts, heads, query, key, value, *pools)

    def run(
        self, kernel: LayerAttention, device: torch.device, rule: ScoreRule = PLAIN
    ) -> Tensor:  # [rows, query heads, dim]
        """One layer's attention, its outputs NaN beforehand."""
        out = torch.full(
            (self.query.shape[1], self.heads.heads, self.heads.dim),
            torch.nan,
            dtype=self.query.dtype,
            device=device,
        )
        inputs = [
            tensor.to(device, copy=True)
            for tensor in (self.query, self.key, self.value, self.key_pool, self.value_pool)
        ]
        kernel(*inputs, self.heads.dim**-0.5, out, **({} if rule == PLAIN else {"rule": rule}))
        return out.cpu()

    def expected(self, rule: ScoreRule = PLAIN) -> Tensor:
        """By the definition, in float32."""
        wide = Pass(
            self.layouts,
            self.heads,
            *(
                tensor.float()
                for tensor in (self.query, self.key, self.value, self.key_pool, self.value_pool)
            ),
        )
        return wide.run(OracleAttention(self.layouts), torch.device("cpu"), rule)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """NaN anywhere is an error without bound."""
    error = float((found.float() - expected).norm() / expected.norm())
    return error if error == error else float("inf")


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
