"""Dividing a step's rows: worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from treecast.draws import Draws, Proposal
from treecast.services.verifier.plan import Work, choose_nodes, plan
from treecast.tree import ROOT, TokenTree


@dataclass(eq=False)
class FakeSequence:
    length: int
    num_rows: int = 0
    capacity: int = 1000


@dataclass(eq=False)
class FakeRequest:
    """As much of a request as planning looks at."""

    tokens: list[int]
    computed: int
    sequence: FakeSequence = field(init=False)

    def __post_init__(self) -> None:
        self.sequence = FakeSequence(self.computed)

    @property
    def pending(self) -> list[int]:
        return self.tokens[self.sequence.length :]

    @property
    def decoding(self) -> bool:
        return self.sequence.length == len(self.tokens) - 1


def decoding() -> FakeRequest:
    return FakeRequest([1, 2, 3], 2)


def flat(rows: int) -> float:
    return 1.0


def linear(rows: int) -> float:
    return 1.0 + 0.1 * rows


def test_all_nodes_are_taken_when_rows_are_free() -> None:
    tree = TokenTree.build([5, 6, 7], [-1, 0, -1], [0.5, 0.5, 0.01])
    (chosen,) = choose_nodes([tree], 1, flat, 10, 1.0)
    assert chosen.tokens == [5, 6, 7]


def test_nodes_stop_when_they_do_not_pay() -> None:
    # A node adds 0.1 s, worth 0.09 tokens. One at 0.5 pays; its child at 0.5 * 0.1 = 0.05 does not.
    tree = TokenTree.build([5, 6], [-1, 0], [0.5, 0.1])
    (chosen,) = choose_nodes([tree], 1, linear, 10, 0.9)
    assert chosen.tokens == [5]


def test_budget_goes_to_the_most_confident_nodes_of_all_trees() -> None:
    sure = TokenTree.build([5, 6], [-1, 0], [0.9, 0.9])  # paths .9, .81
    unsure = TokenTree.build([7, 8], [-1, -1], [0.85, 0.3])
    chosen = choose_nodes([unsure, sure], 2, flat, 3, 1.0)
    assert [tree.tokens for tree in chosen] == [[7], [5, 6]]


def test_a_child_waits_for_its_parent_when_it_is_the_surer_one() -> None:
    tree = TokenTree.build([5, 6, 9], [-1, 0, -1], [0.2, 1.0, 0.3])
    (chosen,) = choose_nodes([tree], 1, flat, 2, 1.0)
    assert sorted(chosen.tokens) == [5, 9]


def test_a_prompt_is_cut_into_chunks_when_it_exceeds_the_rows() -> None:
    newcomer = FakeRequest(list(range(100)), 0)
    (work,) = plan([newcomer], [TokenTree()], flat, 64, 1.0)  # type: ignore[list-item]
    assert (work.num_pending, work.samples) == (64, False)
    newcomer.sequence.length = 64
    (work,) = plan([newcomer], [TokenTree()], flat, 64, 1.0)  # type: ignore[list-item]
    assert (work.num_pending, work.samples) == (36, True)


def test_decoding_goes_on_when_a_long_prompt_arrives() -> None:
    old, newcomer = decoding(), FakeRequest(list(range(1000)), 0)
    tree = TokenTree.chain([4, 5], confidence=0.9)
    works = plan([old, newcomer], [tree, TokenTree()], flat, 32, 1.0)  # type: ignore[list-item]
    assert [work.num_rows for work in works] == [3, 29]


def test_prompts_get_all_rows_when_the_only_trees_wait_for_prompts_too() -> None:
    requests = [FakeRequest(list(range(1000)), 0) for _ in range(2)]
    trees = [TokenTree(), TokenTree.chain(range(8), confidence=0.9)]
    works = plan(requests, trees, flat, 32, 1.0)  # type: ignore[arg-type]
    assert [work.num_rows for work in works] == [32]


def test_a_trees_price_is_what_its_rows_add_to_the_step() -> None:
    trees = [TokenTree.chain(range(size), confidence=1.0) for size in (2, 3)]
    works = plan([decoding(), decoding()], trees, linear, 32, 0.5)  # type: ignore[list-item]
    assert [work.tree_price for work in works] == pytest.approx([0.5 * 0.2, 0.5 * 0.3])


def test_a_step_never_exceeds_its_rows() -> None:
    requests = [decoding() for _ in range(10)] + [FakeRequest(list(range(50)), 0)]
    trees = [TokenTree.chain(range(8)) for _ in range(10)] + [TokenTree()]
    works = plan(requests, trees, flat, 24, 1.0)  # type: ignore[arg-type]
    assert sum(work.num_rows for work in works) == 24


@pytest.mark.parametrize("pending", [[128], [40, 40, 48], [122, 1]])
def test_a_step_never_exceeds_its_rows_when_trees_of_draws_wait_for_prompts(
    pending: list[int],
) -> None:
    """Trees of draws are taken whole; so the prompts that they hang below leave them room."""
    requests = [FakeRequest(list(range(count)), 0) for count in pending]
    tree, ids = TokenTree(), tuple(range(24))
    tree.draw(ROOT, Draws(Proposal.WITHOUT_REPLACEMENT, ids, (1.0,) * 24, ids))
    works = plan(requests, [tree] * len(pending), flat, 128, 1.0)  # type: ignore[arg-type]
    assert sum(work.num_rows for work in works) <= 128
    shares = {len(work.tree) for work in works if work.samples}
    assert len(shares) <= 1  # whatever was drawn


def test_segment_hangs_the_tree_below_the_last_pending_token() -> None:
    request = FakeRequest([1, 2, 3, 4], 1)
    tree = TokenTree.build([7, 8, 9], [-1, 0, -1])
    segment = Work(request, 3, tree).segment()  # type: ignore[arg-type]
    assert list(segment.tokens) == [2, 3, 4, 7, 8, 9]
    assert list(segment.parents) == [-1, 0, 1, 2, 3, 2]
    assert list(segment.wanted) == [2, 3, 4, 5]


def test_path_names_pending_rows_then_accepted_nodes() -> None:
    request = FakeRequest([1, 2, 3, 4], 1)
    work = Work(request, 3, TokenTree.build([7, 8, 9], [-1, 0, -1]))  # type: ignore[arg-type]
    assert work.path([0, 1]) == [0, 1, 2, 3, 4]
    assert work.path([]) == [0, 1, 2]


@pytest.mark.parametrize("max_rows", [2, 3])
def test_requests_wait_their_turn_when_rows_are_few(max_rows: int) -> None:
    requests = [decoding() for _ in range(5)]
    works = plan(requests, [TokenTree()] * 5, flat, max_rows, 1.0)  # type: ignore[arg-type]
    assert [work.request for work in works] == requests[:max_rows]
