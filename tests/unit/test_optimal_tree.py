"""The optimal tree against a search of all trees, by hand and by simulation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treecast.drafting.growth import (
    UNEXPANDED,
    Acceptance,
    Expansion,
    OptimalTrees,
    Planned,
    Shape,
    Size,
    StepCost,
    optimal_tree,
    parse_growth,
)
from treecast.drafting.growth.acceptance import PERIOD, PRIOR, PRIOR_WEIGHT
from treecast.tree import ROOT

Forest = tuple["Forest", ...]
"""What hangs below a node: each child's own forest."""


@cache
def forests(nodes: int, depth: int, width: int) -> tuple[Forest, ...]:
    """All ordered forests of exactly that many nodes."""
    return tuple(_forests(nodes, depth, width))


def _forests(nodes: int, depth: int, width: int) -> Iterator[Forest]:
    if nodes == 0:
        yield ()
    elif depth and width:
        for first in range(1, nodes + 1):
            below = forests(first - 1, depth - 1, 3)
            rest = forests(nodes - first, depth, width - 1)
            yield from ((child, *others) for child, others in itertools.product(below, rest))


def worth(forest: Forest, acceptance: list[float]) -> float:
    pairs = zip(acceptance, forest, strict=False)
    return sum(share * (1 + worth(child, acceptance)) for share, child in pairs)


@given(
    st.lists(st.floats(0, 0.33), min_size=3, max_size=3),
    st.integers(0, 7),
    st.integers(0, 4),
)
@settings(deadline=None)
def test_tree_is_the_best_of_all_when_searched(
    acceptance: list[float], max_nodes: int, max_depth: int
) -> None:
    best = max(
        worth(forest, acceptance)
        for nodes in range(max_nodes + 1)
        for forest in forests(nodes, max_depth, 3)
    )
    shape = optimal_tree(acceptance, max_nodes, max_depth)
    assert len(shape) <= max_nodes
    assert shape.expected_tokens(acceptance) == pytest.approx(best, abs=1e-12)
    table = OptimalTrees(acceptance, Size(max_nodes, max_depth)).expected_tokens
    assert table[max_depth, max_nodes] == pytest.approx(best, abs=1e-12)


def test_tree_is_a_chain_when_only_first_children_are_accepted() -> None:
    assert optimal_tree([0.9, 0.0], max_nodes=3, max_depth=9) == Shape((ROOT, 0, 1), (0, 0, 0))


def test_tree_branches_when_depth_is_worth_less() -> None:
    # Worth: first child .5, second .3, first below the first .25, second below it .15.
    assert optimal_tree([0.5, 0.3], max_nodes=3, max_depth=9) == Shape((ROOT, ROOT, 0), (0, 1, 0))
    assert optimal_tree([0.5, 0.3], max_nodes=3, max_depth=1) == Shape((ROOT, ROOT), (0, 1))


def test_expected_tokens_are_observed_when_simulated() -> None:
    acceptance = [0.5, 0.2, 0.1]
    shape = optimal_tree(acceptance, max_nodes=10, max_depth=4)
    children = {
        place: node for node, place in enumerate(zip(shape.parents, shape.ranks, strict=True))
    }
    rng = np.random.default_rng(0)
    ranks = rng.choice(4, p=[0.5, 0.2, 0.1, 0.2], size=(40000, 5))  # 3: none of them
    accepted = []
    for row in ranks:
        node, count = ROOT, 0
        for rank in row:
            found = children.get((node, int(rank)))
            if found is None:
                break
            node, count = found, count + 1
        accepted.append(count)
    error = np.std(accepted) / len(accepted) ** 0.5
    assert abs(np.mean(accepted) - shape.expected_tokens(acceptance)) < 4 * error


def test_size_is_that_of_most_tokens_per_second_when_costs_are_known() -> None:
    # A chain of d nodes yields 1 + .5 + .. + .5**d tokens in 10 + 1 * (d + 1) + 1 * d ms:
    # 1/11 = .0909, 1.5/13 = .1154, 1.75/15 = .1167, 1.875/17 = .1103.
    trees = OptimalTrees([0.5], Size(8, 8))
    assert trees.fastest(StepCost(0.010, 0.001, 0.001)) == Size(2, 2)
    assert trees.fastest(StepCost(0.010, 1.0, 0.0)) == Size(0, 0)
    # A tenth of the cost per row and per pass: 1.875/10.7 = .1752, 1.9375/10.9 = .17775,
    # 1.96875/11.1 = .17736.
    assert trees.fastest(StepCost(0.010, 0.0001, 0.0001)) == Size(4, 4)


def test_acceptance_is_renewed_when_a_period_has_passed() -> None:
    acceptance = Acceptance()
    for _ in range(PERIOD - 1):
        acceptance.saw(1)
    assert (acceptance.vector, acceptance.version) == (PRIOR, 0)
    acceptance.saw(None)
    total = PRIOR_WEIGHT + PERIOD
    assert acceptance.version == 1
    assert acceptance.vector[0] == pytest.approx(PRIOR_WEIGHT * PRIOR[0] / total)
    assert acceptance.vector[1] == pytest.approx((PRIOR_WEIGHT * PRIOR[1] + PERIOD - 1) / total)
    assert sum(acceptance.vector) < 1


def test_acceptance_follows_the_draft_when_it_changes() -> None:
    acceptance = Acceptance()
    for _ in range(20 * PERIOD):
        acceptance.saw(0)
    for _ in range(8 * PERIOD):
        acceptance.saw(None)
    assert acceptance.vector[0] < 0.1


# Root: 10, 11; below 10, which is computed: 20, 21.
EXPANSIONS = [Expansion([10, 11], [0.6, 0.3], {10: 1}), Expansion([20, 21], [0.5, 0.25])]


def test_plan_is_filled_as_far_as_computed_when_selected() -> None:
    # .5 .25 .125: the plan of 5 nodes is 0, 00, 1, 000, 01 or, at equal worth, 0000.
    growth = Planned(Acceptance(vector=(0.5, 0.25)))
    assert growth.select(EXPANSIONS, max_nodes=3).tree.tokens == [10, 11, 20]
    chosen = growth.select(EXPANSIONS, max_nodes=2)
    assert chosen.tree.tokens == [10, 20] or chosen.tree.tokens == [10, 11]
    deep = growth.select(EXPANSIONS, max_nodes=12)
    assert deep.tree.tokens == [10, 11, 20, 21]
    assert deep.expansions == [1, UNEXPANDED, UNEXPANDED, UNEXPANDED]
    assert 0 not in growth.frontier(deep, max_nodes=12)
    assert 2 in growth.frontier(deep, max_nodes=12)


def test_plan_has_no_frontier_when_its_inner_nodes_are_computed() -> None:
    growth = Planned(Acceptance(vector=(0.5, 0.3)))
    assert growth.frontier(growth.select(EXPANSIONS, max_nodes=3), max_nodes=3) == []


def test_plan_changes_only_when_the_acceptance_is_renewed() -> None:
    acceptance = Acceptance(vector=(0.9, 0.01))
    growth = Planned(acceptance)
    assert growth.select(EXPANSIONS, max_nodes=2).tree.tokens == [10, 20]
    acceptance.vector = (0.4, 0.3)
    assert growth.select(EXPANSIONS, max_nodes=2).tree.tokens == [10, 20]
    acceptance.version += 1
    assert growth.select(EXPANSIONS, max_nodes=2).tree.tokens == [10, 11]


def test_plans_are_solved_for_once_when_several_policies_share_an_acceptance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solved: list[Size] = []

    class Counted(OptimalTrees):
        def __init__(self, vector: Sequence[float], largest: Size) -> None:
            solved.append(largest)
            super().__init__(vector, largest)

    monkeypatch.setattr("treecast.drafting.growth.acceptance.OptimalTrees", Counted)
    shared = Acceptance()
    cost = StepCost(0.010, 0.001, 0.001)
    for nodes, with_cost in ((5, None), (12, None), (12, cost), (3, cost), (5, None)):
        alone = Planned(Acceptance(), cost=with_cost)._shape(nodes, 4)
        solved.pop()
        assert Planned(shared, cost=with_cost)._shape(nodes, 4) == alone
    assert solved == [Size(5, 4), Size(12, 4)]
    shared.version += 1
    for _ in range(3):
        Planned(shared)._shape(7, 4)
    assert solved[2:] == [Size(7, 4)]


def test_plan_is_read_when_written_with_its_bounds() -> None:
    acceptance = Acceptance()
    assert parse_growth("dp", acceptance) == Planned(acceptance)
    assert parse_growth(" dp:24 ", acceptance) == Planned(acceptance, 24)
    cost = StepCost(0.010, 0.0003, 0.002)
    assert parse_growth("dp:24:10,0.3,2", acceptance) == Planned(acceptance, 24, cost)


def test_plan_is_as_small_as_pays_when_costs_are_known() -> None:
    growth = Planned(Acceptance(vector=(0.5,)), cost=StepCost(0.010, 0.001, 0.001))
    assert growth.select(EXPANSIONS, max_nodes=8).tree.tokens == [10, 20]
