"""The replay law: whatever the tree, the output is that of plain decoding."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats

from treecast.sampling.laws import walk
from treecast.sampling.noise import gumbel, noise_key
from treecast.sampling.params import SamplingParams
from treecast.sampling.pick import Picker
from treecast.sampling.replay import Replay
from treecast.sampling.transforms import Context
from treecast.tree import ROOT, TokenTree

NUM_SEEDS = 10_000
MAX_DEPTH = 4
PROMPT = [0, 1]

Model = Callable[[Sequence[int]], NDArray[np.float32]]

SAMPLINGS = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=1.3, top_k=3, min_p=0.05),
    SamplingParams(temperature=0, repetition_penalty=1.8, frequency_penalty=0.4),
    SamplingParams(presence_penalty=0.9, frequency_penalty=0.3, logit_bias={1: 0.7}),
]


def random_model(vocab_size: int, rng: np.random.Generator) -> Model:
    """A row per last two tokens."""
    table = rng.normal(0, 1.5, (vocab_size, vocab_size, vocab_size)).astype(np.float32)
    return lambda text: table[text[-1], text[-2]]


def random_tree(vocab_size: int, source: random.Random) -> TokenTree:
    tree = TokenTree()
    for _ in range(source.randrange(24)):
        parent, token = source.randrange(ROOT, len(tree)), source.randrange(vocab_size)
        shallow = parent == ROOT or tree.depths[parent] < MAX_DEPTH
        if shallow and tree.child(parent, token) is None:
            tree.add(token, parent)
    return tree


def rows_of(tree: TokenTree, model: Model, text: Sequence[int]) -> list[NDArray[np.float32]]:
    """What one pass over the tree computes: the root's row, then each node's."""
    paths = [tree.sequence(node) for node in range(ROOT, len(tree))]
    return [model([*text, *path]) for path in paths]


def plainly(model: Model, sampling: SamplingParams, key: int, num_tokens: int) -> list[int]:
    """Plain decoding, one token after the other."""
    picker, text = Picker(sampling, key, Context(PROMPT)), list(PROMPT)
    for _ in range(num_tokens):
        text.append(picker.pick(model(text)))
        picker.accept(text[-1])
    return text[len(PROMPT) :]


def never(token: int) -> None:
    return None


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=range(len(SAMPLINGS)))
def test_walks_equal_plain_decoding_when_trees_are_random(sampling: SamplingParams) -> None:
    """Two walks each, so that the second begins where the first left the context."""
    source, rng = random.Random(1), np.random.default_rng(1)
    accepted = 0
    for seed in range(NUM_SEEDS // len(SAMPLINGS) + 1):
        vocab_size = source.randint(2, 9)
        model = random_model(vocab_size, rng)
        picker, text = Picker(sampling, noise_key(seed), Context(PROMPT)), list(PROMPT)
        for _ in range(2):
            tree = random_tree(vocab_size, source)
            walked = walk(tree, rows_of(tree, model, text), picker, never, Replay())
            assert [tree.tokens[node] for node in walked.accepted] == walked.tokens[:-1]
            text += walked.tokens
            accepted += len(walked.accepted)
        output = text[len(PROMPT) :]
        assert output == plainly(model, sampling, noise_key(seed), len(output))
    assert accepted > NUM_SEEDS / len(SAMPLINGS) / 2


def coupled_tree(model: Model, key: int, width: int, max_depth: int = MAX_DEPTH) -> TokenTree:
    """A draft that shares the target's logits: children are the best of logit + noise under key."""
    tree, frontier = TokenTree(), [ROOT]
    for depth in range(max_depth):
        for node in list(frontier):
            row = model([*PROMPT, *tree.sequence(node)])
            noisy = row + gumbel(key, len(PROMPT) + depth, len(row))
            children = np.argsort(-noisy)[:width].tolist()
            frontier += [tree.add(token, node) for token in children]
            frontier.remove(node)
    return tree


def test_draft_noise_changes_acceptance_and_never_output() -> None:
    rng, sampling = np.random.default_rng(2), SamplingParams()
    accepted = {"same key": 0, "other key": 0}
    for seed in range(400):
        model = random_model(8, rng)
        outputs = []
        for name, draft_key in (("same key", noise_key(seed)), ("other key", noise_key(seed, 1))):
            tree = coupled_tree(model, draft_key, width=1)
            picker = Picker(sampling, noise_key(seed), Context(PROMPT))
            walked = walk(tree, rows_of(tree, model, PROMPT), picker, never, Replay())
            accepted[name] += len(walked.accepted)
            outputs.append(walked.tokens)
        expected = plainly(model, sampling, noise_key(seed), MAX_DEPTH + 1)
        assert outputs == [expected[: len(output)] for output in outputs]
    assert accepted["same key"] == 400 * MAX_DEPTH
    assert accepted["other key"] < 400 * MAX_DEPTH / 2


# --- the distribution ---------------------------------------------------------------------------

SMALL = random_model(4, np.random.default_rng(3))


def pair_p_value(pairs: Counter[tuple[int, ...]]) -> float:
    """Chi-square of the first two tokens against the product of exact softmaxes."""
    total = sum(pairs.values())
    observed, expected = [], []
    for first, second in itertools.product(range(4), repeat=2):
        prob = special.softmax(SMALL(PROMPT))[first] * special.softmax(SMALL([*PROMPT, first]))
        observed.append(pairs[first, second])
        expected.append(float(prob[second]) * total)
    scale = total / sum(expected)
    return float(stats.chisquare(observed, [value * scale for value in expected]).pvalue)


def next_two(key: int, tree: TokenTree) -> tuple[int, ...]:
    picker, text = Picker(SamplingParams(), key, Context(PROMPT)), list(PROMPT)
    while len(text) < len(PROMPT) + 2:
        text += walk(tree, rows_of(tree, SMALL, text), picker, never, Replay()).tokens
        tree = TokenTree()
    return tuple(text[len(PROMPT) : len(PROMPT) + 2])


def test_walk_follows_the_exact_probabilities_when_drafts_see_the_noise() -> None:
    keys = [noise_key(seed) for seed in range(NUM_SEEDS)]
    pairs = Counter(next_two(key, coupled_tree(SMALL, key, width=1, max_depth=1)) for key in keys)
    assert pair_p_value(pairs) > 1e-3


def test_law_is_told_apart_when_picks_keep_to_the_tree() -> None:
    """Choosing among a tree's children only, as if the tree were always right, is another law."""
    pairs: Counter[tuple[int, ...]] = Counter()
    for seed in range(NUM_SEEDS):
        key, text = noise_key(seed), list(PROMPT)
        for _ in range(2):
            row = SMALL(text)
            noisy = row + gumbel(key, len(text), 4)
            noisy[row.argmin()] = -np.inf  # a tree of the three likeliest
            text.append(int(noisy.argmax()))
        pairs[tuple(text[len(PROMPT) :])] += 1
    assert pair_p_value(pairs) < 1e-6
