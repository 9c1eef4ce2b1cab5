"""Growth policies on expansions written down by hand."""

from __future__ import annotations

import pytest

from treecast.drafting.growth import (
    UNEXPANDED,
    BestFirst,
    Expansion,
    ExpansionVector,
    parse_growth,
)
from treecast.errors import InvalidRequest
from treecast.tree import ROOT

# Root: 10 (.6), 11 (.3), 12 (.1). Below 10, which is computed: 20 (.5), 21 (.25).
EXPANSIONS = [
    Expansion([10, 11, 12], [0.6, 0.3, 0.1], {10: 1}),
    Expansion([20, 21], [0.5, 0.25]),
]


def test_best_first_takes_surest_paths_when_budget_is_short() -> None:
    # Path confidence: 10 .6, 11 .3, 10-20 .3, 10-21 .15, 12 .1.
    chosen = BestFirst().select(EXPANSIONS, max_nodes=4)
    assert chosen.tree.tokens == [10, 11, 20, 21]
    assert chosen.tree.parents == [ROOT, ROOT, 0, 0]
    assert chosen.tree.confidence == [0.6, 0.3, 0.5, 0.25]
    assert chosen.expansions == [1, UNEXPANDED, UNEXPANDED, UNEXPANDED]


def test_best_first_takes_all_when_budget_is_large() -> None:
    chosen = BestFirst().select(EXPANSIONS, max_nodes=99)
    assert chosen.tree.tokens == [10, 11, 20, 21, 12]


def test_best_first_keeps_few_children_when_told() -> None:
    assert BestFirst(num_children=1).select(EXPANSIONS, max_nodes=99).tree.tokens == [10, 20]


def test_best_first_computes_surest_unexpanded_nodes_when_there_is_room() -> None:
    growth = BestFirst(width=3)
    chosen = growth.select(EXPANSIONS, max_nodes=8)
    # Nodes 1 (11), 2 (20) and 3 (21) go before 4 (12); 0 is computed.
    assert growth.frontier(chosen, max_nodes=8) == [1, 2, 3]


def test_best_first_is_grown_when_no_child_could_enter_a_full_tree() -> None:
    growth = BestFirst()
    # Full at 2 nodes, .6 and .3: a child of 11 is believed .3 at most, which enters nothing.
    assert growth.frontier(growth.select(EXPANSIONS, max_nodes=2), max_nodes=2) == []
    # Full at 4, the weakest .15: children of 11 and of 20 may be better than that.
    assert growth.frontier(growth.select(EXPANSIONS, max_nodes=4), max_nodes=4) == [1, 2]


def test_best_first_leaves_unlikely_nodes_when_told() -> None:
    growth = BestFirst(min_confidence=0.2)
    assert growth.frontier(growth.select(EXPANSIONS, max_nodes=8), max_nodes=8) == [1, 2]


def test_best_first_stops_when_depth_is_reached() -> None:
    growth = BestFirst(min_confidence=0)
    shallow = growth.select(EXPANSIONS, max_nodes=8, max_depth=1)
    assert shallow.tree.tokens == [10, 11, 12]
    assert growth.frontier(shallow, max_nodes=8, max_depth=1) == []
    deep = growth.select(EXPANSIONS, max_nodes=8, max_depth=2)
    assert growth.frontier(deep, max_nodes=8, max_depth=2) == [1, 4]


def test_vector_gives_each_level_its_width_when_computed() -> None:
    growth = ExpansionVector((2, 1))
    chosen = growth.select(EXPANSIONS, max_nodes=99)
    assert chosen.tree.tokens == [10, 11, 20]
    assert chosen.tree.parents == [ROOT, ROOT, 0]
    # 11 still lacks its one child; 20 is on the last level.
    assert growth.frontier(chosen, max_nodes=99) == [1]


def test_vector_is_cut_to_surest_nodes_when_budget_is_short() -> None:
    chosen = ExpansionVector((3, 2)).select(EXPANSIONS, max_nodes=3)
    assert chosen.tree.tokens == [10, 11, 20]
    assert chosen.expansions == [1, UNEXPANDED, UNEXPANDED]


def test_vector_counts_its_nodes_when_asked() -> None:
    growth = ExpansionVector((1, 1, 3, 1))
    assert growth.num_nodes == 1 + 1 + 3 + 3
    assert (growth.num_children, growth.max_passes) == (3, 4)


@pytest.mark.parametrize("text", ["1,1,3,1", "<1,1,3,1>", " < 1, 1,3 ,1 > "])
def test_vector_is_read_when_written_either_way(text: str) -> None:
    assert parse_growth(text) == ExpansionVector((1, 1, 3, 1))
    assert str(parse_growth(text)) == "<1,1,3,1>"


def test_vector_is_taken_when_just_at_the_limit() -> None:
    assert ExpansionVector((16, 15)).num_nodes == 256


def test_policy_is_best_first_when_named() -> None:
    assert parse_growth("best-first") == BestFirst()
    assert parse_growth("best-first:0.03") == BestFirst(min_confidence=0.03)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<1,0>", "expansion width is 0; the least is 1"),
        ("<-2>", "expansion width is -2; the least is 1"),
        ("<16,16>", "expansion <16,16> makes trees of 272 nodes; the limit is 256"),
        (",".join(["1"] * 33), "expansion has 33 levels; allowed: 1..32"),
        ("1,,3", "expansion is '1,,3'; it must be widths by level such as <1,1,3>"),
        (
            "",
            "growth is ''; it must be best-first, dp, dp:NODES or dp:NODES:FIXED_MS,ROW_MS,"
            "PASS_MS, or widths by level such as <1,1,3>",
        ),
        (
            "wide",
            "growth is 'wide'; it must be best-first, dp, dp:NODES or dp:NODES:FIXED_MS,"
            "ROW_MS,PASS_MS, or widths by level such as <1,1,3>",
        ),
        ("best-first:1", "best-first computes above 1.0; allowed: 0..1"),
        ("best-first:nan", "best-first computes above nan; allowed: 0..1"),
        (
            "best-first:x",
            "growth is 'best-first:x'; it must be best-first or best-first:CONFIDENCE",
        ),
        ("dp:0", "dp plans 0 nodes; allowed: 1..256"),
        ("dp:257", "dp plans 257 nodes; allowed: 1..256"),
        (
            "dp:many",
            "growth is 'dp:many'; it must be dp, dp:NODES or dp:NODES:FIXED_MS,ROW_MS,PASS_MS",
        ),
        (
            "dp:24:1,2",
            "growth is 'dp:24:1,2'; it must be dp, dp:NODES or dp:NODES:FIXED_MS,ROW_MS,PASS_MS",
        ),
        (
            "dp:24:0,1,1",
            "dp has costs StepCost(fixed_s=0.0, row_s=0.001, pass_s=0.001); "
            "a step takes time, no part of it less than 0",
        ),
    ],
)
def test_growth_is_refused_when_malformed(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_growth(text)
    assert str(refused.value) == message
