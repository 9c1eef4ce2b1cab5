"""Lookup drafting, by hand and against a search of the whole text."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from treecast.drafting.base import DraftRequest
from treecast.drafting.lookup import grow
from treecast.drafting.ngram import (
    LONGEST_MATCH,
    MAX_MATCHES,
    Matches,
    NgramDrafter,
    TextIndex,
)
from treecast.errors import Overloaded
from treecast.sampling.params import SamplingParams
from treecast.tree import ROOT

texts = st.lists(st.integers(0, 12), min_size=1, max_size=130)


def index_of(*pieces: list[int]) -> TextIndex:
    index = TextIndex()
    for piece in pieces:
        index.extend(piece)
    return index


def search(text: list[int]) -> Matches:
    """The slow oracle: compare the text's end with the text before every place."""
    found = {}
    for place in range(1, len(text)):
        length = 0
        while length < min(place, LONGEST_MATCH) and text[place - 1 - length] == text[-1 - length]:
            length += 1
        if length:
            found[place] = length
    return found


def request(tokens: list[int]) -> DraftRequest:
    return DraftRequest(tokens, len(tokens), SamplingParams(temperature=0), noise_key=0)


def test_follower_is_proposed_when_suffix_occurred_before() -> None:
    index = index_of([1, 2, 3, 9, 1, 2])
    assert index.end == {2: 2}
    assert index.next_tokens(index.end, ()) == {3: pytest.approx(4 / (5 + 4))}


def test_votes_add_up_when_matches_agree() -> None:
    # "7" stands before 4, 5 and 4; most recent first the votes are 1, 1/sqrt(2) and 1/sqrt(3).
    index = index_of([7, 4, 7, 5, 7, 4, 7])
    belief = index.next_tokens({1: 1, 3: 1, 5: 1}, ())
    total = 5 + 1 + 2**-0.5 + 3**-0.5
    assert belief == {4: pytest.approx((1 + 3**-0.5) / total), 5: pytest.approx(2**-0.5 / total)}


def test_tree_is_empty_when_nothing_repeats() -> None:
    assert len(grow(index_of([1, 2, 3]), max_nodes=8)) == 0


def test_loop_is_followed_beyond_the_text_when_it_repeats() -> None:
    tree = grow(index_of([1, 2, 3, 1, 2]), max_nodes=7)
    assert tree.tokens == [3, 1, 2, 3, 1, 2, 3]
    assert tree.parents == [ROOT, 0, 1, 2, 3, 4, 5]


def test_tree_branches_when_matches_disagree() -> None:
    # After 7 came 4 8 (lately) and 5 9; the likelier of the two goes first at each size.
    tree = grow(index_of([7, 5, 9, 7, 4, 8, 7]), max_nodes=4)
    assert {tuple(tree.sequence(node)) for node in range(len(tree))} == {
        (4,),
        (5,),
        (4, 8),
        (5, 9),
    }
    assert tree.tokens[0] == 4


def test_depth_is_capped_when_asked() -> None:
    tree = grow(index_of([1, 2, 1]), max_nodes=50, max_depth=3)
    assert max(tree.depths) == 3


def test_long_match_survives_when_its_tokens_are_common() -> None:
    rng = random.Random(0)
    noise = [0 if rng.random() < 0.5 else rng.randrange(50, 1000) for _ in range(2000)]
    passage = [0, 11, 0, 0, 12, 0, 13, 0]
    index = index_of([*passage, 99, *noise, *passage])
    assert index.end[len(passage)] == len(passage)
    assert max(index.next_tokens(index.end, ()).items(), key=lambda item: item[1])[0] == 99


@given(texts, st.integers(0, 130))
def test_matches_equal_a_search_of_the_whole_text_when_pieces_vary(
    text: list[int], cut: int
) -> None:
    assume(max(Counter(text).values()) <= MAX_MATCHES)
    assert index_of(text[:cut], text[cut:]).end == search(text)


@given(texts, st.lists(st.integers(0, 12), max_size=6))
def test_matches_of_a_path_equal_a_search_when_path_is_followed(
    text: list[int], path: list[int]
) -> None:
    assume(max(Counter(text).values()) <= MAX_MATCHES // 2)
    index = index_of(text)
    matches = index.end
    for count, token in enumerate(path):
        matches = index.follow(matches, path[:count], token)
    expected = search([*text, *path])
    assert matches.items() <= expected.items()
    assert {place for place in expected if place <= len(text)} <= matches.keys()


@given(texts)
def test_belief_is_a_sub_distribution_when_text_is_random(text: list[int]) -> None:
    index = index_of(text)
    belief = index.next_tokens(index.end, ())
    assert all(0 < share < 1 for share in belief.values())
    assert sum(belief.values()) < 1


@given(texts, st.integers(1, 40))
def test_tree_is_valid_when_text_is_random(text: list[int], max_nodes: int) -> None:
    grow(index_of(text), max_nodes).validate(vocab_size=13, max_nodes=max_nodes)


def test_drafter_keeps_sessions_apart_when_texts_differ() -> None:
    drafter = NgramDrafter()
    drafter.open(1, request([1, 2, 1]))
    drafter.open(2, request([1, 5, 6]))
    drafter.commit(2, [1])
    trees = drafter.draft({1: 1, 2: 1})
    assert (trees[1].tokens, trees[2].tokens) == ([2], [5])


def test_drafter_refuses_when_full_and_takes_again_when_one_closes() -> None:
    drafter = NgramDrafter(capacity=1)
    drafter.open(1, request([1]))
    with pytest.raises(Overloaded, match=r"ngram drafter has 1 sessions; the limit is 1"):
        drafter.open(2, request([1]))
    drafter.close(1)
    drafter.close(1)
    drafter.open(2, request([1]))
