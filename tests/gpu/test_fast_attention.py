"""Triton's fast tree attention beside the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from treecast.kernels.plan import SegmentLayout
from treecast.kernels.scores import PLAIN, ScoreRule
from treecast.kernels.triton_fast import TritonFastAttention

from .bed import TOLERANCE, Heads, Pass, Text, chain, layouts_of, random_tree, relative_error

SMALL = Heads(kv_heads=1, group=2, dim=16)


def error_of(
    texts: list[Text],
    heads: Heads,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    rule: ScoreRule = PLAIN,
    seed: int = 0,
) -> float:
    layouts = layouts_of(texts, seed)
    given = Pass.random(layouts, heads, dtype, seed)
    found = given.run(TritonFastAttention.over(layouts, device), device, rule)
    return relative_error(found, given.expected(rule))


QUICK = {
    "a lone row, nothing before it": [Text(0, [-1])],
    "a lone row at a page's end": [Text(63, [-1])],
    "a tree from nothing": [Text(0, random_tree(5, 1))],
    "rows join a tree that is there": [Text(70, random_tree(9, 2), num_rows=3)],
    "several sequences": [Text(130, random_tree(4, 3)), Text(5, [-1]), Text(64, chain(3))],
}

LONG = {
    "the largest tree": [Text(65, random_tree(256, 2))],
    "the largest tree from nothing": [Text(0, random_tree(256, 3))],
    "siblings only": [Text(100, [-1] * 40)],
    "a chunk of a prompt": [Text(30, chain(150))],
    "a long text": [Text(2100, random_tree(24, 4))],
    "many of many lengths": [Text(37 * i, random_tree(1 + 3 * i, i)) for i in range(8)],
}


@pytest.mark.parametrize("shape", QUICK)
def test_attention_is_what_the_definition_says(shape: str, device: torch.device) -> None:
    assert error_of(QUICK[shape], SMALL, device) < TOLERANCE[torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("shape", LONG)
def test_attention_is_what_the_definition_says_when_large(shape: str, device: torch.device) -> None:
    assert error_of(LONG[shape], Heads(2, 3, 32), device) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_is_right_in_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    assert error_of([Text(80, random_tree(6, 1))], SMALL, device, dtype) < TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_is_right_for_every_head(
    dim: int, group: int, dtype: torch.dtype, device: torch.device
) -> None:
    texts = [Text(75, random_tree(20, dim)), Text(200, [-1])]
    assert error_of(texts, Heads(2, group, dim), device, dtype) < TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_attention_is_right_for_random_passes(seed: int, device: torch.device) -> None:
    rng = np.random.default_rng(seed)
    texts = []
    for number in range(rng.integers(1, 5)):
        parents = random_tree(int(rng.integers(1, 90)), 100 * seed + number)
        rows = int(rng.integers(1, len(parents) + 1))
        texts.append(Text(int(rng.integers(0, 400)), parents, rows))
    heads = Heads(int(rng.integers(1, 4)), int(rng.integers(1, 6)), int(rng.choice([16, 40, 64])))
    assert error_of(texts, heads, device, seed=seed) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "rule", [ScoreRule(softcap=1.5), ScoreRule(window=5), ScoreRule(softcap=2.0, window=70)]
)
def test_attention_obeys_the_rule_of_its_scores(rule: ScoreRule, device: torch.device) -> None:
    texts = [Text(150, random_tree(9, 5))]
    assert error_of(texts, SMALL, device, rule=rule) < TOLERANCE[torch.float32]


def test_attention_differs_when_a_rule_is_left_out(device: torch.device) -> None:
    """The negative control: the cap and the window are seen by the comparison."""
    layouts = layouts_of([Text(100, [-1, 0])])
    given = Pass.random(layouts, SMALL)
    found = given.run(TritonFastAttention.over(layouts, device), device)
    assert relative_error(found, given.expected(ScoreRule(softcap=1.5))) > 0.01
    assert relative_error(found, given.expected(ScoreRule(window=70))) > 0.01


def test_attention_differs_when_one_ancestor_is_hidden(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: one bit of one row is flipped."""
    layouts = layouts_of([Text(20, [-1, 0, 1, 1, 3])])
    given, honest = Pass.random(layouts, SMALL), SegmentLayout.visible
    expected = given.expected()

    def one_bit_wrong(layout: SegmentLayout) -> NDArray[np.bool_]:
        visible = honest(layout)
        visible[4, 1] = not visible[4, 1]
        return visible

    monkeypatch.setattr(SegmentLayout, "visible", one_bit_wrong)
    found = given.run(TritonFastAttention.over(layouts, device), device)
    assert relative_error(found[:4], expected[:4]) < TOLERANCE[torch.float32]
    assert relative_error(found[4], expected[4]) > 0.01
