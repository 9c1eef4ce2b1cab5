"""One layer's tree attention against the memory floor, SDPA with a mask, and FlexAttention."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from treecast.kernels.plan import LayerAttention, SegmentLayout
from treecast.kernels.triton_exact import TritonExactAttention
from treecast.kernels.triton_fast import TritonFastAttention
from treecast.prefix import PAGE_TOKENS

from .ceilings import Ceilings, graphed_s

KV_HEADS, DIM = 8, 128
NODES, CONTEXTS, GROUPS = (16, 32, 64), (4096, 16384), (1, 4)
_UNCACHED_BYTES = 200_000_000
_TOLERANCE = 1e-2


@dataclass(frozen=True, slots=True)
class AttentionFigure:
    """One shape; seconds of one layer, `None` for what could not run and why in `notes`.

    Attributes:
        floor_s: the larger of bytes over bandwidth and operations over rate.
        bandwidth_share: keys and values over fast seconds, of the measured bandwidth.
        error: of `fast`, by the norm, beside SDPA in float32.
    """

    nodes: int
    context: int
    group: int
    floor_s: float
    bound: str
    fast_s: float
    exact_s: float
    sdpa_s: float | None
    flex_s: float | None
    bandwidth_share: float
    error: float
    notes: tuple[str, ...]


def figures(ceilings: Ceilings) -> Iterator[AttentionFigure]:
    """All shapes, one after the other."""
    for context in CONTEXTS:
        for group in GROUPS:
            for nodes in NODES:
                yield _measure(Case(nodes, context, group), ceilings)


@dataclass(frozen=True, slots=True)
class Case:
    """One shape; context in positions, group in query heads that share a KV head."""

    nodes: int
    context: int
    group: int

    @property
    def kv_bytes(self) -> int:
        return 2 * 2 * KV_HEADS * DIM * (self.context + self.nodes)

    @property
    def operations(self) -> int:
        return 4 * KV_HEADS * self.group * self.nodes * DIM * (self.context + self.nodes)

    @property
    def parents(self) -> list[int]:
        rng = random.Random(self.nodes)
        return [rng.randint(-1, node - 1) if node else -1 for node in range(self.nodes)]


def _measure(case: Case, ceilings: Ceilings) -> AttentionFigure:
    device = torch.device("cuda")
    copies = 1 + _UNCACHED_BYTES // case.kv_bytes
    inputs = [Inputs(case, seed, device) for seed in range(copies)]
    layouts = [one.layout for one in inputs]
    notes: list[str] = []

    def timed(name: str, make: Callable[[Inputs], Callable[[], object]]) -> float | None:
        try:
            return graphed_s([make(one) for one in inputs])
        except Exception as error:  # reported; a peer that cannot run must not end the bench
            notes.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            return None

    fast = [TritonFastAttention.over([layout], device) for layout in layouts]
    exact = [TritonExactAttention.over([layout], device) for layout in layouts]
    fast_s = graphed_s([one.call(kernel) for one, kernel in zip(inputs, fast, strict=True)])
    exact_s = graphed_s([one.call(kernel) for one, kernel in zip(inputs, exact, strict=True)])
    error = inputs[0].error(fast[0])
    assert error < _TOLERANCE, f"fast attention is off by {error}"
    error_exact = inputs[0].error(exact[0])
    assert error_exact < _TOLERANCE, f"exact attention is off by {error_exact}"
    by_bytes = case.kv_bytes / ceilings.bytes_per_s
    by_operations = case.operations / ceilings.operations_per_s
    return AttentionFigure(
        nodes=case.nodes,
        context=case.context,
        group=case.group,
        floor_s=max(by_bytes, by_operations),
        bound="bytes" if by_bytes > by_operations else "operations",
        fast_s=fast_s,
        exact_s=exact_s,
        sdpa_s=timed("sdpa", Inputs.sdpa),
        flex_s=timed("flex", Inputs.flex),
        bandwidth_share=by_bytes / fast_s,
        error=error,
        notes=tuple(notes),
    )


class Inputs:
    """A layer of one pass: random pools with shuffled pages, and the same keys in one piece."""

    def __init__(self, case: Case, seed: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)

        slots = case.context + case.nodes
        pages = list(range(-(-slots // PAGE_TOKENS)))
        random.Random(seed).shuffle(pages)
        places = [
            pages[slot // PAGE_TOKENS] * PAGE_TOKENS + slot % PAGE_TOKENS for slot in range(slots)
        ]
        self.case = case
        self.layout = SegmentLayout(0, case.nodes, case.context, case.parents, None, places)
        self.query = draw(KV_HEADS * case.group, case.nodes, DIM)
        self.key, self.value = draw(2, KV_HEADS, case.nodes, DIM)
        self.key_pool, self.value_pool = draw(2, KV_HEADS, len(pages) * PAGE_TOKENS, DIM)
        index = torch.tensor(places[: case.context], device=device)
        self.keys = torch.cat((self.key_pool[:, index], self.key), 1)[None]
        self.values = torch.cat((self.value_pool[:, index], self.value), 1)[None]
        self.seen = torch.from_numpy(self.layout.visible()).to(device)

    def call(self, kernel: LayerAttention) -> Callable[[], object]:
        out = torch.full(
            (self.case.nodes, KV_HEADS * self.case.group, DIM),
            torch.nan,
            device=self.query.device,
            dtype=torch.bfloat16,
        )
        inputs = (self.query, self.key, self.value, self.key_pool, self.value_pool)

        def run() -> Tensor:
            kernel(*inputs, DIM**-0.5, out)
            return out

        return run

    def error(self, kernel: LayerAttention) -> float:
        """By the norm, beside SDPA in float32."""
        found = self.call(kernel)()
        assert isinstance(found, Tensor)
        expected = F.scaled_dot_product_attention(
            self._packed().float(),
            self.keys.float(),
            self.values.float(),
            attn_mask=self._mask(),
        )
        rows = expected.view(KV_HEADS * self.case.group, self.case.nodes, DIM).transpose(0, 1)
        return float((found.float() - rows).norm() / rows.norm())

    def sdpa(self) -> Callable[[], object]:
        """As one would without a kernel: the heads of a KV head packed as rows, a mask of all."""
        packed, mask = self._packed(), self._mask()
        return lambda: F.scaled_dot_product_attention(
            packed, self.keys, self.values, attn_mask=mask
        )

    def flex(self) -> Callable[[], object]:
        """Compiled FlexAttention, heads expanded by its own means."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        seen, context = self.seen, self.case.context

        def visible(batch: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
            return (slot < context) | seen[row, (slot - context).clamp(min=0)]

        slots = self.keys.shape[2]
        block_mask = create_block_mask(
            visible, None, None, self.case.nodes, slots, device=str(seen.device)
        )
        compiled = torch.compile(flex_attention)
        query = self.query[None]
        return lambda: compiled(
            query, self.keys, self.values, block_mask=block_mask, enable_gqa=self.case.group > 1
        )

    def _packed(self) -> Tensor:
        return self.query.reshape(1, KV_HEADS, -1, DIM)

    def _mask(self) -> Tensor:
        full = torch.ones(
            (self.case.nodes, self.case.context), dtype=torch.bool, device=self.seen.device
        )
        return torch.cat((full, self.seen), 1).repeat(self.case.group, 1)
