"""Groups of draws: in trees, on the wire, from drafters, and divided by the planner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from treecast.drafting.base import DraftRequest
from treecast.drafting.growth import BestFirst, Growth
from treecast.drafting.merge import MergedDrafter
from treecast.drafting.ngram import NgramDrafter
from treecast.drafting.proposal import DraftPosition, Weighed, draw, propose, weigh
from treecast.drafting.ssm import SSMDrafter
from treecast.draws import DrawGroup, Draws, Proposal, distribution
from treecast.engine.toy import ToyEngine
from treecast.errors import InvalidRequest, InvalidTree
from treecast.sampling.decisions import Domain, Uniforms
from treecast.sampling.laws import acceptance_rule
from treecast.sampling.params import Law, SamplingParams, SpeculationParams
from treecast.sampling.transforms import Context
from treecast.services.verifier.plan import choose_nodes
from treecast.tree import ROOT, TokenTree, merge
from treecast.v1 import tree_pb2
from treecast.wire import codec

IID, WITHOUT = Proposal.IID, Proposal.WITHOUT_REPLACEMENT
HALVES = {"ids": (5, 6), "weights": (0.5, 0.5)}
NOISY = SamplingParams(temperature=1)


def halves(*drawn: int, kind: Proposal = IID) -> Draws:
    return Draws(kind, (5, 6), (0.5, 0.5), drawn)


def example() -> TokenTree:
    """Below the root 5, 5, 6; below 5 another 6, 5."""
    tree = TokenTree()
    tree.draw(ROOT, halves(5, 5, 6))
    tree.draw(0, halves(6, 5))
    return tree


# --- in trees ----------------------------------------------------------------------------------


def test_repeats_are_one_node_when_drawn() -> None:
    tree = example()
    assert (tree.tokens, tree.parents) == ([5, 6, 6, 5], [ROOT, ROOT, 0, 0])
    assert [group.draws.drawn for group in tree.groups] == [(5, 5, 6), (6, 5)]
    assert tree.confidence == [0.5] * 4


@pytest.mark.parametrize(
    ("max_nodes", "tokens", "drawn"),
    [
        (4, [5, 6, 6, 5], [(5, 5, 6), (6, 5)]),
        (3, [5, 6, 6], [(5, 5, 6), (6,)]),
        (2, [5, 6], [(5, 5, 6)]),
        (1, [5], [(5,)]),  # the second 5 needs no node, but a 6 in its place would have
        (0, [], []),
    ],
)
def test_draws_are_cut_by_position_when_nodes_are_few(
    max_nodes: int, tokens: list[int], drawn: list[tuple[int, ...]]
) -> None:
    tree = example().limit(max_nodes)
    assert tree.tokens == tokens
    assert [group.draws.drawn for group in tree.groups] == drawn


def test_whole_levels_go_when_the_depth_is_limited() -> None:
    tree = example().limit(99, max_depth=1)
    assert (tree.tokens, len(tree.groups)) == ([5, 6], 1)


def test_groups_below_the_path_stay_when_rerooted() -> None:
    rest = example().reroot([5])
    assert rest is not None
    assert (rest.tokens, rest.parents) == ([6, 5], [ROOT, ROOT])
    assert rest.groups == [DrawGroup(ROOT, halves(6, 5))]
    assert example().reroot([6]) == TokenTree()


def test_groups_are_left_behind_when_nodes_are_chosen_by_confidence() -> None:
    pruned = example().prune(3)
    assert len(pruned) == 3
    assert pruned.groups == []
    with pytest.raises(InvalidTree, match=r"node 0 is no draw of a group; law mss needs the draws"):
        acceptance_rule(Law.MSS).check(pruned)
    acceptance_rule(Law.REPLAY).check(pruned)


def test_multiplicity_and_distributions_are_kept_when_trees_merge() -> None:
    other = TokenTree()
    other.draw(ROOT, Draws(WITHOUT, (6, 7), (0.25, 0.75), (7, 6)), proposers=2)
    union = merge([example(), other])
    # Level by level: the second proposer goes before the second level of the first.
    assert union.tokens == [5, 6, 7, 6, 5]
    assert union.proposers == [1, 3, 2, 1, 1]
    below_root = union.groups_below(ROOT)
    assert [group.draws.drawn for group in below_root] == [(5, 5, 6), (7, 6)]
    assert [group.draws.weights for group in below_root] == [(0.5, 0.5), (0.25, 0.75)]
    cut = merge([example(), other], max_nodes=4)
    assert [group.draws.drawn for group in cut.groups] == [(5, 5, 6), (7, 6), (6,)]


@pytest.mark.parametrize("second", [5, 6])
def test_a_draw_at_the_bound_goes_whether_or_not_it_is_a_repeat(second: int) -> None:
    one, other = TokenTree(), TokenTree()
    one.draw(ROOT, halves(5))
    other.draw(ROOT, halves(second), proposers=2)
    cut = merge([one, other], max_nodes=1)
    assert [group.draws.drawn for group in cut.groups] == [(5,)]


# --- on the wire ---------------------------------------------------------------------------------


def test_groups_come_back_the_same_when_sent() -> None:
    tree = example()
    third = float(np.float32(1 / 3))
    tree.draw(1, Draws(WITHOUT, (1, 2, 3), (third, third, third), (3, 1)), proposers=4)
    back = codec.decode_tree(codec.encode_tree(tree))
    assert back.groups == tree.groups
    assert distribution(back.groups[2].draws.weights).sum() == pytest.approx(1, abs=1e-15)


def message(**changes: Any) -> tree_pb2.TokenTree:
    encoded = codec.encode_tree(example())
    for name, value in changes.items():
        field = getattr(encoded.groups[0], name)
        if isinstance(value, Sequence):
            del field[:]
            field.extend(value)
        else:
            setattr(encoded.groups[0], name, value)
    return encoded


HOSTILE = [
    (
        {"probabilities": [0.5, 0.4]},
        "probabilities of group 0 sum to 0.9; allowed: 1 within 0.0001",
    ),
    (
        {"probabilities": [-0.5, 1.0]},
        "group 0 gives token 5 probability -0.5; the bounds are (0, 1]",
    ),
    ({"probabilities": [math.nan, 1]}, "group 0 gives token 5 probability nan"),
    ({"probabilities": [math.inf, 1]}, "group 0 gives token 5 probability inf"),
    ({"probabilities": [0, 1]}, "group 0 gives token 5 probability 0.0; the bounds are (0, 1]"),
    ({"probabilities": [1]}, "group 0 has 2 token ids and 1 probabilities"),
    ({"ids": [5, 97]}, "group 0 gives token 97 a probability; the vocabulary has 97"),
    ({"ids": [5, 5]}, "group 0 gives a token two probabilities"),
    ({"ids": [5, 7]}, "group 0 draws token 6, to which it gives no probability"),
    ({"draws": [5, 5]}, None),
    ({"draws": []}, "group 0 has no draws; allowed: 1..64"),
    ({"draws": [5] * 65}, "number of draws of group 0 is 65; the limit is 64"),
    ({"ids": range(257)}, "number of tokens of group 0 is 257; the limit is 256"),
    ({"parent": 5}, "group 0 hangs below node 4; the tree has 4"),
    ({"parent": 3}, "group 0 draws token 5, which is no child of node 2"),
    ({"kind": 4}, "group 0 draws without replacement and repeats 1 of its draws"),
    ({"kind": 1}, "group 0 has kind 1; allowed: 4 (without_replacement), 3 (iid)"),
    ({"kind": 9}, "group 0 has kind 9; allowed: 4 (without_replacement), 3 (iid)"),
    ({"proposer": 0}, "group 0 has proposer bits 0; allowed: one of the 2 that the peer named"),
    ({"proposer": 3}, "group 0 has proposer bits 3; allowed: one of the 2 that the peer named"),
    ({"proposer": 4}, "group 0 has proposer bits 4; allowed: one of the 2 that the peer named"),
]


@pytest.mark.parametrize(("changes", "error"), HOSTILE)
def test_group_is_refused_by_name_when_it_cannot_have_been_drawn(
    changes: dict[str, Any], error: str | None
) -> None:
    limits = codec.Limits(vocab_size=97, num_proposers=2)
    if error is None:
        codec.decode_tree(message(**changes), limits)
        return
    with pytest.raises(InvalidTree) as refused:
        codec.decode_tree(message(**changes), limits)
    assert refused.value.message.startswith(error)


def test_groups_are_refused_when_there_are_too_many() -> None:
    encoded = codec.encode_tree(example())
    encoded.groups.extend([encoded.groups[0]] * 511)
    with pytest.raises(InvalidTree, match="number of groups of draws is 513; the limit is 512"):
        codec.decode_tree(encoded)


# --- from drafters -------------------------------------------------------------------------------


def request(
    tokens: Sequence[int], speculation: SpeculationParams, sampling: SamplingParams = NOISY
) -> DraftRequest:
    return DraftRequest(tokens, len(tokens), sampling, 5, speculation, draft_key=9)


def grown(growth: Growth, speculation: SpeculationParams, max_nodes: int = 24) -> TokenTree:
    drafter = SSMDrafter(ToyEngine(vocab_size=11), growth)
    drafter.open(1, request([1, 2], speculation))
    return drafter.draft({1: max_nodes})[1]


def test_widths_are_those_asked_for_when_draws_are_independent() -> None:
    tree = grown(BestFirst(), SpeculationParams.of(Law.MSS, IID, "<3,2>"))
    acceptance_rule(Law.MSS).check(tree)
    assert [len(group.draws.drawn) for group in tree.groups_below(ROOT)] == [3]
    below = [group for group in tree.groups if group.parent != ROOT]
    assert {len(group.draws.drawn) for group in below} == {2}
    assert len(below) == len(
        {t for t, p in zip(tree.tokens, tree.parents, strict=True) if p == ROOT}
    )


def test_siblings_draw_by_different_numbers_when_of_one_position() -> None:
    drawn = set()
    for key in range(40):
        drafter = SSMDrafter(ToyEngine(vocab_size=11), BestFirst())
        asked = replace(
            request([1, 2], SpeculationParams.of(Law.MSS, growth="<2,1>")), draft_key=key
        )
        drafter.open(1, asked)
        tree = drafter.draft({1: 9})[1]
        left, right = (group for group in tree.groups if group.parent != ROOT)
        ranks = [group.draws.ids.index(group.draws.drawn[0]) for group in (left, right)]
        drawn.add(ranks[0] == ranks[1])
    assert drawn == {True, False}


def test_default_vector_is_grown_when_own_growth_chooses_by_value() -> None:
    tree = grown(BestFirst(), SpeculationParams.of(Law.MSS))
    assert [len(group.draws.drawn) for group in tree.groups_below(ROOT)] == [3]
    assert max(tree.depths) == 4
    assert len(tree) <= 24


def test_growth_is_refused_by_name_when_mss_cannot_serve_it() -> None:
    with pytest.raises(InvalidRequest) as refused:
        grown(BestFirst(), SpeculationParams.of(Law.MSS, growth="best-first"))
    message = "growth under law mss is 'best-first'; allowed: widths by level such as <3,2,1,1>"
    assert refused.value.message == message


def test_draws_stay_the_same_when_a_commit_was_foreseen() -> None:
    drafter = SSMDrafter(ToyEngine(vocab_size=11), BestFirst())
    drafter.open(1, request([1, 2], SpeculationParams.of(Law.MSS, growth="<2,2>")))
    tree = drafter.draft({1: 16})[1]
    below = tree.reroot([tree.tokens[0]])
    drafter.commit(1, [tree.tokens[0]])
    again = drafter.draft({1: 16})[1]
    assert below is not None
    assert again.groups_below(ROOT) == below.groups_below(ROOT)


def test_lookup_is_certain_of_its_guesses_when_the_law_is_mss() -> None:
    drafter = MergedDrafter([SSMDrafter(ToyEngine(vocab_size=11), BestFirst()), NgramDrafter()])
    text = [1, 2, 3, 1, 2]
    drafter.open(1, request(text, SpeculationParams.of(Law.MSS)))
    tree = drafter.draft({1: 24})[1]
    acceptance_rule(Law.MSS).check(tree)
    by_lookup = [group for group in tree.groups_below(ROOT) if group.proposers == 2]
    assert [group.draws.drawn for group in by_lookup] == [(3,)]
    assert by_lookup[0].draws.weights == (1.0,)


@pytest.mark.parametrize("proposal", [Proposal.TOPK, IID, WITHOUT])
def test_tree_carries_no_distributions_when_the_law_is_replay(proposal: Proposal) -> None:
    tree = grown(BestFirst(), SpeculationParams(Law.REPLAY, proposal))
    assert len(tree) > 0
    assert tree.groups == []


def test_children_are_the_likeliest_when_the_proposal_is_top_k() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    asked = request([1], SpeculationParams(proposal=Proposal.TOPK))
    children = propose(logits, Context([1]), DraftPosition(1), asked, num_children=3)
    assert children.tokens == [1, 3, 2]
    assert children.confidence == pytest.approx([0.4, 0.3, 0.2])


def test_distribution_is_cut_before_drawing_when_sampling_says_so() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    weighed = weigh(logits, Context([1]), SamplingParams(top_k=2))
    assert weighed.ids == (1, 3)
    assert weighed.weights == pytest.approx((4 / 7, 3 / 7))
    assert weigh(logits, Context([1]), SamplingParams(temperature=0)) == Weighed((1,), (1.0,))


def test_all_there_are_is_drawn_when_more_is_asked_without_replacement() -> None:
    draws = draw(Weighed((4, 5), (0.9, 0.1)), WITHOUT, 3, Uniforms(1, 0, Domain.DRAFT))
    assert sorted(draws.drawn) == [4, 5]


def test_frequencies_are_the_probabilities_when_drawn_by_counted_uniforms() -> None:
    weighed = Weighed((0, 1, 2), (0.5, 0.3, 0.2))
    drawn = [draw(weighed, IID, 1, Uniforms(7, at, Domain.DRAFT)).drawn[0] for at in range(4000)]
    shares = np.bincount(drawn) / 4000
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_uniforms_differ_when_domain_branch_or_position_do() -> None:
    places = [(1, 2, Domain.VERIFY, 0), (1, 2, Domain.DRAFT, 0), (1, 2, Domain.DRAFT, 1)]
    places += [(1, 3, Domain.DRAFT, 0), (2, 2, Domain.DRAFT, 0)]
    weights = np.ones(1 << 20)
    chosen = [Uniforms(*place).choose(weights) for place in places]
    assert len(set(chosen)) == len(places)
    assert Uniforms(1, 2).choose(weights) == chosen[0]
    many = Uniforms(1, 2)
    assert len({many.choose(weights) for _ in range(100)}) > 95


# --- in the plan ------------------------------------------------------------------------------


def test_draws_are_taken_whole_when_nodes_compete() -> None:
    """Rows that cost so much that no other node is worth one."""
    chain = TokenTree.chain([1, 2], 0.5)
    drawn, rest = choose_nodes([example(), chain], 2, lambda rows: rows**3, 100, 1.0)
    assert drawn == example()
    assert len(rest) == 0
