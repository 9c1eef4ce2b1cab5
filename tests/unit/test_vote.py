"""Votes worked out by hand, and weights on planted drafters."""

from __future__ import annotations

import math

import numpy as np
import pytest

from treecast.services.verifier.choice.ballot import elect
from treecast.services.verifier.choice.base import Offer
from treecast.services.verifier.choice.hedge import Hedge
from treecast.tree import TokenTree

VOCAB = 50


def offer(place: int, tree: TokenTree, *voters: str) -> Offer:
    moved = [bits << 8 * place for bits in tree.proposers]
    return Offer(
        voters, 8 * place, TokenTree.build(tree.tokens, tree.parents, tree.confidence, moved)
    )


def offers(*chains: list[int]) -> list[Offer]:
    return [offer(place, TokenTree.chain(chain), f"v{place}") for place, chain in enumerate(chains)]


def one(voter: str) -> float:
    return 1.0


# --- the election -----------------------------------------------------------------------------


def test_majority_wins_each_position_when_weights_are_equal() -> None:
    chain = elect(offers([1, 2, 3], [1, 2, 4], [9, 2, 4]), one, 8)
    assert chain.tokens == [1, 2, 3]  # v2 left at 9; then 3 against 4 is one vote each: lower id


def test_heavier_voter_wins_when_two_disagree() -> None:
    chain = elect(offers([1, 2], [5, 6]), {"v0": 0.9, "v1": 1.1}.__getitem__, 8)
    assert chain.tokens == [5, 6]


def test_outvoted_drafter_votes_on_when_its_tree_holds_the_chain() -> None:
    wide = TokenTree.build([1, 7, 8, 3], [-1, -1, 1, 0], [0.6, 0.4, 0.9, 0.9])
    both = [offer(0, wide, "wide"), offer(1, TokenTree.chain([7]), "narrow")]
    chain = elect(both, {"wide": 1.0, "narrow": 2.0}.__getitem__, 8)
    assert chain.tokens == [7, 8]
    assert chain.proposers == [1 << 8 | 1, 1]  # both held 7
    assert chain.confidence == [1.0, 0.9]


def test_two_proposers_of_one_speculator_vote_each_for_its_own() -> None:
    tree = TokenTree.build([4, 5], [-1, -1], [0.3, 0.9], [0b01, 0b10])
    (merged,) = [offer(0, tree, "model", "lookup")]
    assert elect([merged], {"model": 2.0, "lookup": 1.0}.__getitem__, 8).tokens == [4]
    assert elect([merged], one, 8).tokens == [5]  # one each: the more confident


def test_chain_is_no_deeper_than_allowed() -> None:
    assert elect(offers([1, 2, 3, 4]), one, 2).tokens == [1, 2]


# --- the weights ------------------------------------------------------------------------------


def test_a_mistake_costs_its_weight_and_silence_nothing() -> None:
    hedge = Hedge()
    hedge.saw({"right": True, "wrong": False})
    down = math.exp(-0.2)
    scale = 2 / (1 + down)
    assert hedge.weight("wrong") == pytest.approx(0.99 * scale * down + 0.01)
    assert hedge.weight("right") == pytest.approx(0.99 * scale + 0.01)
    assert hedge.weight("silent") == 1.0


def test_nobody_gains_when_a_voter_is_alone() -> None:
    hedge = Hedge()
    for _ in range(50):
        hedge.saw({"alone": False})
    assert hedge.weight("alone") == pytest.approx(1.0)


def test_a_voter_comes_back_when_it_is_right_again() -> None:
    hedge = Hedge()
    for _ in range(500):
        hedge.saw({"a": True, "b": False})
    for _ in range(60):
        hedge.saw({"a": False, "b": True})
    assert hedge.weight("b") > hedge.weight("a")


def accepted_per_step(hedge: Hedge, learns: bool, seed: int) -> float:
    """Mean accepted length of voted chains; three drafters, two poor ones that err alike."""
    rng, accepted, steps = np.random.default_rng(seed), 0, 600
    for _ in range(steps):
        truth = rng.integers(0, VOCAB, 5).tolist()
        poor = [t if rng.random() < 0.4 else (t + 1) % VOCAB for t in truth]
        good = [t if rng.random() < 0.8 else (t + 2) % VOCAB for t in truth]
        drafts = {"v0": poor, "v1": poor, "v2": good}
        chain = elect(offers(*drafts.values()), hedge.weight, 5).tokens
        accepted += next((d for d in range(len(chain)) if chain[d] != truth[d]), len(chain))
        if learns:
            hedge.saw({voter: draft[0] == truth[0] for voter, draft in drafts.items()})
    return accepted / steps


@pytest.mark.parametrize("seed", range(3))
def test_weights_follow_the_best_drafter_and_equal_weights_accept_less(seed: int) -> None:
    # The good one alone: .8 + .8^2 + ... + .8^5 = 2.69; the poor ones, a majority: .66.
    learned, equal = Hedge(), Hedge()
    with_weights = accepted_per_step(learned, True, seed)
    without = accepted_per_step(equal, False, seed)
    assert learned.weight("v2") > learned.weight("v0") + learned.weight("v1")
    assert with_weights > 2.4
    assert without < 0.9
