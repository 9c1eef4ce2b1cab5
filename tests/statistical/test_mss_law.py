"""The law mss: what comes out is distributed as the target's, by enumeration of all that can be.

The draws come from the drafters' own `draw`, the tokens from the verifier's own `walk`; only chance
is replaced, by every answer that it could give.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from treecast.drafting.proposal import Weighed, draw
from treecast.draws import DrawGroup, Draws, Proposal
from treecast.sampling.decisions import Decisions
from treecast.sampling.laws import walk
from treecast.sampling.mss import MSS, target_probs
from treecast.sampling.params import SamplingParams
from treecast.sampling.pick import Picker
from treecast.sampling.transforms import Context
from treecast.tree import ROOT, TokenTree

from .enumeration import outcomes

IID, WITHOUT = Proposal.IID, Proposal.WITHOUT_REPLACEMENT
EXACT = 1e-9
PROMPT = [0]
PLAIN = SamplingParams()
VECTORS = [widths for levels in (1, 2, 3) for widths in itertools.product((1, 2, 3), repeat=levels)]

Path = tuple[int, ...]
Law = Counter[Path]


# --- a target and a draft per text --------------------------------------------------------------


@cache
def logits_after(vocab_size: int, path: Path) -> NDArray[np.float32]:
    rng = np.random.default_rng([vocab_size, 7, *path])
    return rng.normal(0, 1.3, vocab_size).astype(np.float32)


@cache
def draft_after(vocab_size: int, path: Path, which: int = 0) -> Weighed:
    """A draft of its own mind; the second one knows some of the tokens only."""
    rng = np.random.default_rng([vocab_size, 11 + which, *path])
    ids = np.arange(vocab_size) if which == 0 else np.arange(1, vocab_size - 1)
    weights = rng.dirichlet(np.ones(len(ids))).astype(np.float32)
    return Weighed(tuple(ids.tolist()), tuple(weights.tolist()))


def probs_after(vocab_size: int, path: Path, sampling: SamplingParams = PLAIN) -> Law:
    context = Context(PROMPT, path)
    probs = target_probs(logits_after(vocab_size, path), context, sampling)
    return Counter({(token,): float(prob) for token, prob in enumerate(probs)})


def distance(law: Law, other: Law) -> float:
    """Total variation."""
    return 0.5 * sum(abs(law[key] - other[key]) for key in law.keys() | other.keys())


# --- one node, all vectors ------------------------------------------------------------------------

Drawing = Callable[[int, Path, int, Decisions], list[Draws]]


def drawing(kind: Proposal) -> Drawing:
    """One proposer."""

    def draws(vocab_size: int, path: Path, width: int, decisions: Decisions) -> list[Draws]:
        return [draw(draft_after(vocab_size, path), kind, width, decisions)]

    return draws


def merged(vocab_size: int, path: Path, width: int, decisions: Decisions) -> list[Draws]:
    """Two proposers of different minds, and a lookup that is sure of itself."""
    first = draw(draft_after(vocab_size, path), IID, width, decisions)
    second = draw(draft_after(vocab_size, path, 1), WITHOUT, max(1, width - 1), decisions)
    return [Draws.certain(sum(path) % vocab_size), first, second]


DRAWINGS = {"iid": drawing(IID), "without": drawing(WITHOUT), "merged": merged}


@cache
def step_law(vocab_size: int, path: Path, width: int, how: str) -> Counter[tuple[int, bool]]:
    """Next token and whether it is a child, by the law's own step at a node of so many draws."""
    law: Counter[tuple[int, bool]] = Counter()

    def run(decisions: Decisions) -> tuple[int, bool]:
        tree = TokenTree()
        for draws in DRAWINGS[how](vocab_size, path, width, decisions):
            tree.draw(ROOT, draws)
        MSS().check(tree)
        picker = Picker(PLAIN, 0, Context(PROMPT, path))
        rows = logits_after(vocab_size, path)
        token = MSS(lambda key, position: decisions).next_token(tree, ROOT, rows, picker)
        return token, tree.child(ROOT, token) is not None

    for probability, outcome in outcomes(run):
        law[outcome] += probability
    return law


def output_law(vocab_size: int, path: Path, widths: Sequence[int], how: str) -> Law:
    """The law of the next len(widths) + 1 tokens, those behind the bonus token plainly decoded."""
    if not widths:
        return probs_after(vocab_size, path)
    law: Law = Counter()
    for (token, is_child), probability in step_law(vocab_size, path, widths[0], how).items():
        longer = (*path, token)
        rest = output_law(vocab_size, longer, widths[1:], how) if is_child else None
        for tail, share in (rest or plain_law(vocab_size, longer, len(widths))).items():
            law[(token, *tail)] += probability * share
    return law


@cache
def plain_law(vocab_size: int, path: Path, num_tokens: int) -> Law:
    law: Law = Counter()
    for (token,), probability in probs_after(vocab_size, path).items():
        if num_tokens == 1:
            law[(token,)] += probability
            continue
        for tail, share in plain_law(vocab_size, (*path, token), num_tokens - 1).items():
            law[(token, *tail)] += probability * share
    return law


@pytest.mark.parametrize("how", DRAWINGS)
@pytest.mark.parametrize(
    "vocab_size", [4, *(pytest.param(size, marks=pytest.mark.slow) for size in (5, 6))]
)
def test_output_law_is_the_targets_when_widths_are_any(vocab_size: int, how: str) -> None:
    accepted = 0.0
    for widths in VECTORS:
        law = output_law(vocab_size, (), widths, how)
        assert distance(law, plain_law(vocab_size, (), len(widths) + 1)) < EXACT, widths
        accepted += sum(
            p for (_, hit), p in step_law(vocab_size, (), widths[0], how).items() if hit
        )
    assert accepted > len(VECTORS) / 3, "hardly anything was accepted, so hardly anything was shown"


# --- whole trees through the whole walk ---------------------------------------------------------


def drawn_tree(vocab_size: int, widths: Sequence[int], how: str, decisions: Decisions) -> TokenTree:
    tree, level = TokenTree(), [ROOT]
    for width in widths:
        children: list[int] = []
        for parent in level:
            path = tuple(tree.sequence(parent))
            for draws in DRAWINGS[how](vocab_size, path, width, decisions):
                children += [n for n in tree.draw(parent, draws) if n not in children]
        level = children
    return tree


def walked_law(
    vocab_size: int,
    grow: Callable[[Decisions], TokenTree],
    num_tokens: int,
    sampling: SamplingParams = PLAIN,
) -> Law:
    """The law of the first tokens of a walk; a shorter walk is continued by plain decoding."""
    law: Law = Counter()

    def run(decisions: Decisions) -> Path:
        tree = grow(decisions)
        MSS().check(tree)
        paths = [tuple(tree.sequence(node)) for node in range(ROOT, len(tree))]
        rows = [logits_after(vocab_size, path) for path in paths]
        picker = Picker(sampling, 0, Context(PROMPT))
        mss = MSS(lambda key, position: decisions)
        return tuple(walk(tree, rows, picker, lambda token: None, mss).tokens)

    for probability, tokens in outcomes(run):
        for tail, share in _rest(vocab_size, tokens, num_tokens).items():
            law[(*tokens, *tail)[:num_tokens]] += probability * share
    return law


def _rest(vocab_size: int, tokens: Path, num_tokens: int) -> Law:
    missing = num_tokens - len(tokens)
    return plain_law(vocab_size, tokens, missing) if missing > 0 else Counter({(): 1.0})


@pytest.mark.parametrize(
    ("widths", "how"),
    [
        ((1, 1, 1), "iid"),
        ((2, 1), "iid"),
        ((1, 2), "without"),
        ((2, 1), "without"),
        ((3,), "merged"),
        pytest.param((2, 2), "iid", marks=pytest.mark.slow),
        pytest.param((2, 1, 1), "without", marks=pytest.mark.slow),
        pytest.param((1, 1), "merged", marks=pytest.mark.slow),
    ],
)
def test_output_law_is_the_targets_when_whole_trees_are_walked(
    widths: tuple[int, ...], how: str
) -> None:
    num_tokens = len(widths) + 1
    law = walked_law(4, lambda chance: drawn_tree(4, widths, how, chance), num_tokens)
    assert distance(law, plain_law(4, (), num_tokens)) < EXACT


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.6, top_p=0.8),
        SamplingParams(top_k=2),
        SamplingParams(min_p=0.3, presence_penalty=0.5),
    ],
    ids=range(4),
)
def test_output_law_is_the_targets_when_logits_are_transformed(sampling: SamplingParams) -> None:
    law = walked_law(5, lambda chance: drawn_tree(5, (3,), "iid", chance), 1, sampling)
    assert distance(law, probs_after(5, (), sampling)) < EXACT


@pytest.mark.parametrize("max_nodes", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("how", DRAWINGS)
def test_output_law_is_the_targets_when_the_tree_is_cut(how: str, max_nodes: int) -> None:
    def grow(decisions: Decisions) -> TokenTree:
        tree = drawn_tree(4, (2, 1) if how != "merged" else (2,), how, decisions)
        return tree.limit(max_nodes)

    assert distance(walked_law(4, grow, 2), plain_law(4, (), 2)) < EXACT


# --- what breaks it ----------------------------------------------------------------------------

TARGET = (0.30, 0.28, 0.22, 0.12, 0.08)
DRAFT = Weighed((0, 1, 2, 3, 4), (0.40, 0.15, 0.12, 0.25, 0.08))


def broken(kind: Proposal, change: Callable[[Draws], Draws], width: int = 3) -> float:
    """Distance from the target's law when a group of draws is tampered with after drawing."""
    law: Law = Counter()

    def run(decisions: Decisions) -> Path:
        tree = TokenTree()
        tree.draw(ROOT, change(draw(DRAFT, kind, width, decisions)))
        logits = np.log(np.array(TARGET)).astype(np.float32)
        picker = Picker(PLAIN, 0, Context(PROMPT))
        return (MSS(lambda key, at: decisions).next_token(tree, ROOT, logits, picker),)

    for probability, token in outcomes(run):
        law[token] += probability
    return distance(law, Counter({(token,): p for token, p in enumerate(TARGET)}))


def belief(token: int) -> float:
    return DRAFT.weights[token]


def in_order(draws: Draws) -> Draws:
    return draws


def first_two(draws: Draws) -> Draws:
    return draws.first(2)


def repeats_merged(draws: Draws) -> Draws:
    return replace(draws, drawn=tuple(dict.fromkeys(draws.drawn)))


def likeliest_three(draws: Draws) -> Draws:
    return replace(draws, drawn=(0, 3, 1))


def best_first(draws: Draws) -> Draws:
    return replace(draws, drawn=tuple(sorted(draws.drawn, key=lambda token: -belief(token))))


def unlikely_pruned(draws: Draws) -> Draws:
    return replace(draws, drawn=tuple(token for token in draws.drawn if belief(token) >= 0.15))


@pytest.mark.parametrize("kind", [IID, WITHOUT])
@pytest.mark.parametrize("change", [in_order, first_two])
def test_law_is_exact_when_draws_are_left_in_order(
    kind: Proposal, change: Callable[[Draws], Draws]
) -> None:
    assert broken(kind, change) < 1e-7  # the float32 logits of TARGET; the law adds nothing


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (repeats_merged, 6e-4),
        (likeliest_three, 0.450),
        (best_first, 0.288),
        (unlikely_pruned, 0.205),
    ],
)
def test_law_is_told_apart_when_draws_are_chosen_by_value(
    change: Callable[[Draws], Draws], expected: float
) -> None:
    assert broken(IID, change) == pytest.approx(expected, abs=5e-4, rel=0)
    assert broken(IID, change) > 1000 * EXACT


def test_law_is_told_apart_when_a_cut_lets_repeats_through() -> None:
    """Keeping a draw because its node is there already is a choice by what was drawn."""

    def repeats_of_the_first(draws: Draws) -> Draws:
        count = 1
        while count < len(draws.drawn) and draws.drawn[count] == draws.drawn[0]:
            count += 1
        return draws.first(count)

    assert broken(IID, repeats_of_the_first) > 1e-4


def test_law_is_told_apart_when_two_proposers_draw_alike() -> None:
    """Why no two drafters of a session share a key."""
    law: Law = Counter()

    def run(decisions: Decisions) -> Path:
        tree, draws = TokenTree(), draw(DRAFT, IID, 1, decisions)
        tree.draw(ROOT, draws)
        tree.groups.append(DrawGroup(ROOT, draws, 2))
        logits = np.log(np.array(TARGET)).astype(np.float32)
        picker = Picker(PLAIN, 0, Context(PROMPT))
        return (MSS(lambda key, at: decisions).next_token(tree, ROOT, logits, picker),)

    for probability, token in outcomes(run):
        law[token] += probability
    assert distance(law, Counter({(token,): p for token, p in enumerate(TARGET)})) > 5e-4
