"""Triton's exact tree attention: what it computes, and that its bits depend on a path alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from treecast.kernels.scores import PLAIN, ScoreRule
from treecast.kernels.triton_exact import TritonExactAttention
from treecast.kernels.triton_fast import TritonFastAttention

from .bed import (
    TOLERANCE,
    Heads,
    Pass,
    Text,
    chain,
    layouts_of,
    random_tree,
    relative_error,
)

SMALL = Heads(kv_heads=1, group=2, dim=16)

SHAPES = {
    "a lone row, nothing before it": [Text(0, [-1])],
    "a tree across the end of a page": [Text(126, random_tree(6, 1))],
    "rows join a tree that is there": [Text(70, random_tree(9, 2), num_rows=3)],
    "several sequences": [Text(130, random_tree(3, 3)), Text(5, [-1]), Text(64, chain(2))],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_attention_is_what_the_definition_says(shape: str, device: torch.device) -> None:
    layouts = layouts_of(SHAPES[shape])
    given = Pass.random(layouts, SMALL)
    found = given.run(TritonExactAttention.over(layouts, device), device)
    assert relative_error(found, given.expected()) < TOLERANCE[torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", [PLAIN, ScoreRule(softcap=3.0, window=100)])
def test_exact_attention_is_right_for_every_head(
    dim: int, dtype: torch.dtype, rule: ScoreRule, device: torch.device
) -> None:
    layouts = layouts_of([Text(600, random_tree(12, dim)), Text(3, chain(70))])
    given = Pass.random(layouts, Heads(2, 4, dim), dtype)
    found = given.run(TritonExactAttention.over(layouts, device), device, rule)
    assert relative_error(found, given.expected(rule)) < TOLERANCE[dtype]


def path_to(row: int, parents: Sequence[int]) -> list[int]:
    path: list[int] = []
    while row >= 0:
        path.append(row)
        row = parents[row]
    return path[::-1]


class Whole:
    """A text's queries, keys and values at every position."""

    def __init__(self, positions: int, heads: Heads, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(7)
        self.heads, self.dtype = heads, dtype
        self.query, self.key, self.value = (
            torch.randn(positions, count, heads.dim, generator=generator).to(dtype)
            for count in (heads.heads, heads.kv_heads, heads.kv_heads)
        )

    def bits(
        self,
        texts: list[Text],
        path: Sequence[int],
        device: torch.device,
        seed: int,
        kernel: type[TritonExactAttention | TritonFastAttention] = TritonExactAttention,
    ) -> Tensor:  # [path, query heads, dim]
        """The text as the first sequence of a pass, its next positions at rows `path`."""
        layouts = layouts_of(texts, seed)
        given = Pass.random(layouts, self.heads, self.dtype, seed)
        layout = layouts[0]
        places = list(layout.places[: layout.length])
        given.key_pool[:, places] = self.key[: layout.length].transpose(0, 1)
        given.value_pool[:, places] = self.value[: layout.length].transpose(0, 1)
        for i, row in enumerate(path):
            position = layout.length + i
            given.query[:, row] = self.query[position]
            given.key[:, row] = self.key[position]
            given.value[:, row] = self.value[position]
        return given.run(kernel.over(layouts, device), device)[list(path)]


def ways_to(position: int, depth: int, seed: int) -> list[tuple[list[Text], list[int]]]:
    """Passes that compute a position last: decoded, prefilled, and in a tree beside others."""
    tree = random_tree(10, seed)
    deepest = max(range(10), key=lambda row: len(path_to(row, tree)))
    path = path_to(deepest, tree)
    return [
        ([Text(position, [-1])], [0]),
        ([Text(position, [-1]), Text(40, [-1, 0])], [0]),
        ([Text(position - depth, chain(depth + 1))], list(range(depth + 1))),
        ([Text(position - len(path) + 1, tree), Text(200, chain(5))], path),
    ]


def assert_same_bits(
    position: int, depth: int, heads: Heads, dtype: torch.dtype, where: torch.device
) -> None:
    whole = Whole(position + 1, heads, dtype)
    found = [
        whole.bits(texts, path, where, seed)[-1]
        for seed, (texts, path) in enumerate(ways_to(position, depth, seed=3))
    ]
    assert all(torch.equal(bits, found[0]) for bits in found[1:])


@pytest.mark.parametrize(("position", "depth"), [(70, 3), (127, 9)])
def test_bits_of_a_row_do_not_depend_on_the_pass(
    position: int, depth: int, device: torch.device
) -> None:
    assert_same_bits(position, depth, SMALL, torch.float32, device)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("position", "depth"), [(700, 130), (511, 20), (512, 20), (1100, 9)])
def test_bits_of_a_row_do_not_depend_on_the_pass_when_long(
    position: int, depth: int, dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    assert_same_bits(position, depth, Heads(2, 3, dim), dtype, device)


def test_bits_differ_between_passes_when_the_kernel_is_fast(device: torch.device) -> None:
    """The negative control: splits by batch are seen by the comparison."""
    whole = Whole(400, SMALL, torch.float32)
    alone, beside = (
        whole.bits(texts, [0], device, 1, TritonFastAttention)
        for texts in ([Text(399, [-1])], [Text(399, [-1]), Text(2000, [-1])])
    )
    assert not torch.equal(alone, beside)


def test_bits_differ_when_a_key_of_the_path_is_another(device: torch.device) -> None:
    """The negative control: the comparison sees one changed key."""
    whole = Whole(80, SMALL, torch.float32)
    honest = whole.bits([Text(79, [-1])], [0], device, 0)
    whole.key[5, 0, 0] += 0.01
    assert not torch.equal(honest, whole.bits([Text(79, [-1])], [0], device, 0))
