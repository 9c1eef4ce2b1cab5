"""Suffix drafting, by hand and against a search of the whole text."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treecast.drafting.automaton import LONGEST, Position, SuffixAutomaton
from treecast.drafting.base import DraftRequest
from treecast.drafting.lookup import grow
from treecast.drafting.suffix import Memory, SuffixDrafter, SuffixLookup
from treecast.errors import Overloaded
from treecast.sampling.params import SamplingParams

texts = st.lists(st.integers(0, 4), max_size=80)


def automaton_of(*pieces: list[int]) -> SuffixAutomaton:
    automaton = SuffixAutomaton()
    for piece in pieces:
        automaton.begin_text()
        for token in piece:
            automaton.append(token)
    return automaton


def occurrences(pieces: tuple[list[int], ...], sequence: list[int]) -> Counter[int]:
    """The slow oracle: what follows a sequence, and how often, by looking at every place."""
    length = len(sequence)
    return Counter(
        text[place + length]
        for text in pieces
        for place in range(len(text) - length)
        if text[place : place + length] == sequence
    )


def longest_match(pieces: tuple[list[int], ...], sequence: list[int]) -> int:
    """Length of the longest suffix of a sequence that occurs in the texts, LONGEST - 1 at most."""
    for length in range(min(len(sequence), LONGEST - 1), 0, -1):
        tail = sequence[len(sequence) - length :]
        for text in pieces:
            starts = range(len(text) - length + 1)
            if any(text[start : start + length] == tail for start in starts):
                return length
    return 0


def followers(automaton: SuffixAutomaton, position: Position) -> dict[int, int]:
    states = automaton.followers[position.state]
    return {token: automaton.counts[state] for token, state in states.items()}


def request(tokens: list[int], prompt_len: int | None = None) -> DraftRequest:
    prompt_len = len(tokens) if prompt_len is None else prompt_len
    return DraftRequest(tokens, prompt_len, SamplingParams(temperature=0), noise_key=0)


def test_follower_is_proposed_when_suffix_occurred_before() -> None:
    # After 1 2, a match of two tokens, came 3: a vote of 4 against 5 for the unseen.
    lookup = SuffixLookup(automaton_of([1, 2, 3, 9, 1, 2]))
    assert lookup.next_tokens(lookup.end, ()) == {3: pytest.approx(4 / (5 + 4))}


def test_each_occurrence_votes_once_when_contexts_are_nested() -> None:
    # "2" was followed by 3 twice and by 5 once; before the first 3 and the 5 stood no 1.
    lookup = SuffixLookup(automaton_of([2, 3, 1, 2, 3, 0, 2, 5, 1, 2]))
    # Matches: "1 2" -> 3 votes 4; "2" -> 3 votes 1 more, 5 votes 1.
    assert lookup.next_tokens(lookup.end, ()) == {
        3: pytest.approx(5 / (5 + 6)),
        5: pytest.approx(1 / (5 + 6)),
    }


def test_tree_branches_by_frequency_when_continuations_differ() -> None:
    text = [7, 4, 8, 7, 4, 8, 7, 5, 9, 7]
    tree = grow(SuffixLookup(automaton_of(text)), max_nodes=3)
    # 7 -> 4 twice, 5 once (votes 2 and 1, of 8); 7 4 -> 8 twice: votes of 8, of 13.
    assert [tuple(tree.sequence(node)) for node in range(3)] == [(4,), (4, 8), (5,)]
    assert tree.confidence == pytest.approx([2 / 8, 8 / 13, 1 / 8])


def test_loop_is_followed_beyond_the_text_when_it_repeats() -> None:
    tree = grow(SuffixLookup(automaton_of([1, 2, 3, 1, 2])), max_nodes=7)
    assert tree.tokens == [3, 1, 2, 3, 1, 2, 3]


def test_tree_is_empty_when_nothing_repeats() -> None:
    assert len(grow(SuffixLookup(automaton_of([1, 2, 3])), max_nodes=8)) == 0


@given(texts, texts, st.lists(st.integers(0, 4), max_size=24))
def test_counts_equal_a_search_when_any_path_is_followed(
    first: list[int], second: list[int], path: list[int]
) -> None:
    automaton, pieces = automaton_of(first, second), (first, second)
    position, read = Position(), []
    for token in path:
        position = automaton.follow(position, token)
        read.append(token)
        length = longest_match(pieces, read)
        assert position.length == length
        if length:
            assert followers(automaton, position) == occurrences(pieces, read[-length:])
        shorter = automaton.shorter(position)
        if shorter.length:
            tail = read[-shorter.length :]
            assert followers(automaton, shorter) == occurrences(pieces, tail)


@given(texts)
def test_context_is_the_text_end_when_tokens_are_appended(text: list[int]) -> None:
    automaton = automaton_of(text)
    assert automaton.context.length == min(len(text), LONGEST - 1)
    if text:
        tail = text[-automaton.context.length :]
        assert followers(automaton, automaton.context) == occurrences((text,), tail)


@given(texts)
def test_automaton_is_linear_when_text_is_random(text: list[int]) -> None:
    assert len(automaton_of(text).counts) <= max(2, 2 * len(text))


@given(texts, st.integers(1, 40))
def test_tree_is_valid_when_text_is_random(text: list[int], max_nodes: int) -> None:
    tree = grow(SuffixLookup(automaton_of(text)), max_nodes)
    tree.validate(vocab_size=5, max_nodes=max_nodes)


def test_memory_is_bounded_when_outputs_keep_coming() -> None:
    memory = Memory(capacity_tokens=20)
    for start in range(100):
        memory.add(range(1000 * start, 1000 * start + 7))
        assert sum(automaton.num_tokens for automaton in memory.automata) <= 20
    memory.add(range(50))  # longer than half of it: the end stays
    assert memory.newer.num_tokens == 10
    assert memory.newer.followers[0].keys() == set(range(40, 50))


def test_outputs_are_proposed_to_others_when_remembered() -> None:
    drafter = SuffixDrafter(memory_tokens=100)
    drafter.open(1, request([50, 51]))
    drafter.commit(1, [1, 2, 3])
    drafter.commit(1, [4])
    drafter.close(1)
    drafter.open(2, request([9, 1, 2]))
    assert drafter.draft({2: 8})[2].tokens == [3, 4]
    # A prompt is quoted to nobody.
    drafter.open(3, request([50]))
    assert len(drafter.draft({3: 8})[3]) == 0


def test_an_output_is_remembered_once_when_its_session_is_attached_anew() -> None:
    drafter = SuffixDrafter(memory_tokens=100)
    drafter.open(1, request([50, 51]))
    drafter.commit(1, [1, 2, 3])
    drafter.close(1)
    drafter.open(1, request([50, 51, 1, 2, 3], prompt_len=2))
    drafter.commit(1, [4, 5])
    drafter.close(1)
    assert drafter._memory is not None
    assert drafter._memory.newer.num_tokens == 5


def test_sessions_are_kept_apart_when_nothing_is_remembered() -> None:
    drafter = SuffixDrafter()
    drafter.open(1, request([1, 2, 3], prompt_len=1))
    drafter.close(1)
    drafter.close(1)
    drafter.open(2, request([9, 1, 2]))
    assert len(drafter.draft({2: 8})[2]) == 0


def test_drafter_refuses_when_full() -> None:
    drafter = SuffixDrafter(capacity=1)
    drafter.open(1, request([1]))
    with pytest.raises(Overloaded, match=r"suffix drafter has 1 sessions; the limit is 1"):
        drafter.open(2, request([1]))


def test_drafting_is_quick_when_the_text_is_a_long_loop() -> None:
    # The construction is linear even where suffix links form one long chain.
    began = time.perf_counter()
    automaton_of([1] * 20000)
    assert time.perf_counter() - began < 5.0
