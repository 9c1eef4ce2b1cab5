"""Token trees: by hand, then against a slow oracle that knows a tree as a set of sequences."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treecast.errors import InvalidTree
from treecast.tree import ROOT, TokenTree, merge

Sequences = dict[tuple[int, ...], tuple[float, int]]
"""The oracle's tree: confidence and proposers of each node by its token sequence."""


def example() -> TokenTree:
    """Root: 5 and 6; below 5: 7 and 5; below 5, 7: 9; below 6: 7."""
    return TokenTree.build(
        tokens=[5, 6, 7, 5, 9, 7],
        parents=[ROOT, ROOT, 0, 0, 2, 1],
        confidence=[0.5, 0.25, 0.5, 0.25, 0.5, 1.0],
        proposers=[1, 2, 1, 1, 3, 2],
    )


# --- by hand ------------------------------------------------------------------------------------


def test_build_fills_depths_and_children() -> None:
    tree = example()
    assert tree.depths == [1, 1, 2, 2, 3, 2]
    assert (tree.child(ROOT, 6), tree.child(0, 5), tree.child(2, 9)) == (1, 3, 4)
    assert (tree.child(ROOT, 7), tree.child(4, 9)) == (None, None)


def test_path_and_sequence_run_from_the_root_down() -> None:
    tree = example()
    assert (tree.path(4), tree.sequence(4)) == ([0, 2, 4], [5, 7, 9])
    assert (tree.path(ROOT), tree.sequence(ROOT)) == ([], [])


def test_ancestor_bits_hold_each_node_and_those_above_it() -> None:
    assert example().ancestor_bits() == [0b1, 0b10, 0b101, 0b1001, 0b10101, 0b100010]


def test_path_confidence_is_the_product_along_the_path() -> None:
    assert example().path_confidence() == [0.5, 0.25, 0.25, 0.125, 0.125, 0.25]


def test_reroot_keeps_what_lies_below_the_committed_tokens() -> None:
    left = example().reroot([5])
    assert left == TokenTree.build([7, 5, 9], [ROOT, ROOT, 0], [0.5, 0.25, 0.5], [1, 1, 3])
    assert left.depths == [1, 1, 2]
    assert example().reroot([5, 7, 9]) == TokenTree()
    assert example().reroot([]) == example()


def test_reroot_gives_none_when_the_tree_lacks_the_committed_tokens() -> None:
    assert example().reroot([7]) is None
    assert example().reroot([5, 7, 9, 1]) is None


def test_prune_keeps_the_likeliest_paths_and_the_first_of_equals() -> None:
    # Path confidences .5 .25 .25 .125 .125 .25; nodes 0, 1, 2, 5 lead.
    assert example().prune(4).tokens == [5, 6, 7, 7]
    assert example().prune(3).tokens == [5, 6, 7]
    assert example().prune(5).tokens == [5, 6, 7, 5, 7]
    assert example().prune(9, max_depth=1).tokens == [5, 6]
    assert example().prune(0) == TokenTree()
    assert example().prune(9, max_depth=0) == TokenTree()


@pytest.mark.parametrize("bad", [math.nan, 3.0, -1.0, 0.0, math.inf])
def test_prune_keeps_parents_when_confidence_is_out_of_bounds(bad: float) -> None:
    tree = TokenTree.build([1, 2, 3, 4], [ROOT, 0, 1, 2], [0.5, bad, bad, 0.5])
    for count in range(5):
        assert tree.prune(count).tokens == [1, 2, 3, 4][:count]


def test_merge_unites_sequences_with_the_higher_confidence_and_all_proposers() -> None:
    other = TokenTree.build([6, 7, 8], [ROOT, 0, 0], [0.75, 0.5, 0.5], [4, 4, 4])
    assert merge([example(), other]) == TokenTree.build(
        tokens=[5, 6, 7, 5, 9, 7, 8],
        parents=[ROOT, ROOT, 0, 0, 2, 1, 1],
        confidence=[0.5, 0.75, 0.5, 0.25, 0.5, 1.0, 0.5],
        proposers=[1, 6, 1, 1, 3, 6, 4],
    )


def test_merge_drops_the_unlikeliest_when_the_union_is_too_large() -> None:
    chains = [TokenTree.chain([token] * 3, confidence=token / 10) for token in (4, 9)]
    assert merge(chains, max_nodes=4).tokens == [4, 9, 9, 9]


def test_merge_leaves_its_arguments_alone() -> None:
    one, other = example(), TokenTree.chain([5, 1], confidence=0.9, proposers=8)
    merge([one, other])
    assert one == example()
    assert other == TokenTree.chain([5, 1], confidence=0.9, proposers=8)
    assert one.child(0, 1) is None


def test_merge_of_nothing_is_the_empty_tree() -> None:
    assert merge([]) == TokenTree()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TokenTree.build([1, 2], [ROOT]),
            "tree arrays differ in length: 2 tokens, 1 parents, 2 confidences, 2 proposers",
        ),
        (
            lambda: TokenTree.build([1, 2], [ROOT, 1]),
            "node 1 has parent 1; a parent precedes its child",
        ),
        (
            lambda: TokenTree.build([1, 2, 3], [ROOT, 2, 1]),
            "node 1 has parent 2; a parent precedes its child",
        ),
        (
            lambda: TokenTree.build([1], [-2]),
            "node 0 has parent -2; a parent precedes its child",
        ),
        (
            lambda: TokenTree.build([1, 2, 2], [ROOT, 0, 0]),
            "node 2 repeats token 2 among the children of 0",
        ),
    ],
    ids=["lengths", "own parent", "cycle", "below the root", "twins"],
)
def test_build_refuses_when_arrays_are_no_tree(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidTree) as refused:
        make()
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (TokenTree.chain(range(9)), "tree has 9 nodes; the limit is 8"),
        (TokenTree.chain(range(5)), "tree has depth 5; the limit is 4"),
        (TokenTree.build([1, 10], [ROOT, ROOT]), "node 1 has token 10; the vocabulary has 10"),
        (TokenTree.build([-1], [ROOT]), "node 0 has token -1; the vocabulary has 10"),
        (TokenTree.chain([1], 0.0), "node 0 has confidence 0.0; the bounds are (0, 1]"),
        (TokenTree.chain([1], 1.5), "node 0 has confidence 1.5; the bounds are (0, 1]"),
        (TokenTree.chain([1], math.nan), "node 0 has confidence nan; the bounds are (0, 1]"),
    ],
)
def test_validate_refuses_what_is_over_its_caps(tree: TokenTree, message: str) -> None:
    with pytest.raises(InvalidTree) as refused:
        tree.validate(vocab_size=10, max_nodes=8, max_depth=4)
    assert str(refused.value) == message


def test_validate_accepts_the_caps_themselves() -> None:
    TokenTree.chain([9, 0, 0, 0], 1.0).validate(vocab_size=10, max_nodes=4, max_depth=4)


# --- against the oracle -------------------------------------------------------------------------


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 40, vocab_size: int = 4) -> TokenTree:
    tree = TokenTree()
    for _ in range(draw(st.integers(0, max_nodes))):
        parent = draw(st.integers(ROOT, len(tree) - 1))
        token = draw(st.integers(0, vocab_size - 1))
        if tree.child(parent, token) is None:
            confidence = draw(st.sampled_from([0.125, 0.25, 0.5, 1.0]))
            tree.add(token, parent, confidence, proposers=draw(st.integers(1, 7)))
    return tree


def oracle(tree: TokenTree) -> Sequences:
    """Sequences by climbing from each node; nothing else of the tree is used."""
    found: Sequences = {}
    for node in range(len(tree)):
        tokens, step = [], node
        while step != ROOT:
            tokens.append(tree.tokens[step])
            step = tree.parents[step]
        found[tuple(reversed(tokens))] = (tree.confidence[node], tree.proposers[node])
    assert len(found) == len(tree)
    return found


def check_structure(tree: TokenTree) -> None:
    """What every tree promises, however it came about."""
    assert all(parent < node for node, parent in enumerate(tree.parents))
    for node in range(len(tree)):
        sequence = tuple(tree.sequence(node))
        assert len(sequence) == tree.depths[node]
        assert tree.child(tree.parents[node], tree.tokens[node]) == node
    assert len(tree._children) == len(tree)
    rebuilt = TokenTree.build(tree.tokens, tree.parents, tree.confidence, tree.proposers)
    assert rebuilt == tree


@given(trees())
def test_paths_and_bits_equal_the_oracles(tree: TokenTree) -> None:
    bits, sequences = tree.ancestor_bits(), list(oracle(tree))
    for node, sequence in enumerate(sequences):
        assert tuple(tree.sequence(node)) == sequence
        above = [i for i, other in enumerate(sequences) if sequence[: len(other)] == other]
        assert tree.path(node) == sorted(above, key=lambda i: len(sequences[i]))
        assert bits[node] == sum(1 << i for i in above)
    check_structure(tree)


@given(trees(), st.data())
def test_descendants_and_reroot_equal_the_oracles(tree: TokenTree, data: st.DataObject) -> None:
    node = data.draw(st.integers(ROOT, len(tree) - 1))
    base = tuple(tree.sequence(node))
    expected = {
        sequence[len(base) :]: value
        for sequence, value in oracle(tree).items()
        if len(sequence) > len(base) and sequence[: len(base)] == base
    }
    left = tree.reroot(base)
    assert left is not None
    assert oracle(left) == expected
    assert len(tree.descendants(node)) == len(expected)
    check_structure(left)


@given(trees(), st.lists(st.integers(0, 3), max_size=5))
def test_reroot_is_none_exactly_when_the_oracle_lacks_the_path(
    tree: TokenTree, tokens: list[int]
) -> None:
    held = not tokens or tuple(tokens) in oracle(tree)
    assert (tree.reroot(tokens) is not None) == held


@given(trees(), st.integers(0, 45), st.integers(0, 6))
def test_prune_keeps_the_best_of_the_oracle(tree: TokenTree, size: int, depth: int) -> None:
    sequences = oracle(tree)
    weight = {
        sequence: math.prod(sequences[sequence[:i]][0] for i in range(1, len(sequence) + 1))
        for sequence in sequences
    }
    shallow = [sequence for sequence in sequences if len(sequence) <= depth]
    best = sorted(shallow, key=lambda s: -weight[s])[:size]  # stable: the first of equals
    pruned = tree.prune(size, depth)
    assert oracle(pruned) == {sequence: sequences[sequence] for sequence in best}
    check_structure(pruned)


@given(st.lists(trees(max_nodes=20), max_size=4))
def test_merge_is_the_union_of_the_oracles(parts: list[TokenTree]) -> None:
    expected: Sequences = {}
    for part in parts:
        for sequence, (confidence, proposers) in oracle(part).items():
            known = expected.get(sequence, (0.0, 0))
            expected[sequence] = (max(known[0], confidence), known[1] | proposers)
    union = merge(parts)
    assert oracle(union) == expected
    check_structure(union)


@given(trees(), st.data())
def test_keep_holds_exactly_the_nodes_named(tree: TokenTree, data: st.DataObject) -> None:
    seeds = data.draw(st.sets(st.integers(0, len(tree) - 1))) if len(tree) else set()
    nodes = {above for node in seeds for above in tree.path(node)}
    kept = tree.keep(nodes)
    sequences = list(oracle(tree).items())
    assert list(oracle(kept).items()) == [sequences[node] for node in sorted(nodes)]
    check_structure(kept)


@given(trees(), trees())
def test_copies_share_nothing_when_one_is_changed(tree: TokenTree, other: TokenTree) -> None:
    before, copied = oracle(tree), tree.copy()
    assert copied == tree
    copied.graft(other)
    copied.add(9, ROOT)
    assert oracle(tree) == before
    check_structure(tree)


@settings(max_examples=10)
@given(st.integers(0, 2**32))
def test_bits_reach_beyond_a_machine_word_when_trees_are_large(seed: int) -> None:
    source, tree = random.Random(seed), TokenTree()
    while len(tree) < 256:
        parent, token = source.randrange(ROOT, len(tree)), source.randrange(50)
        if tree.child(parent, token) is None:
            tree.add(token, parent)
    bits = tree.ancestor_bits()
    for node in range(256):
        assert bits[node] == sum(1 << step for step in tree.path(node))
