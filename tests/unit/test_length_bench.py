"""The bench of length-aware scheduling: prompts that lead to answers of known lengths."""

from __future__ import annotations

from treecast.bench.lengths import (
    ARMS,
    LIMIT,
    LONG,
    SHORT,
    STOP,
    VOCABULARY,
    Trace,
    endings,
    steps_to_stop,
)
from treecast.engine.toy import toy_state
from treecast.services.router.settings import RouterSettings


def greedy_length(prompt: list[int]) -> int:
    """Tokens up to and with the stop token, from the toy model's own state."""
    state, count = toy_state(prompt), 0
    while True:
        token = state.favoured(VOCABULARY)
        state, count = state.after(token), count + 1
        if token == STOP:
            return count


def test_answers_are_as_long_as_the_trace_says() -> None:
    asks = Trace(1).asks(per_s=20, seconds=5)
    assert len(asks) > 50
    assert [ask.length for ask in asks] == [greedy_length(ask.prompt) for ask in asks]
    assert {ask.length in SHORT or ask.length in LONG for ask in asks} == {True}
    assert all(STOP not in ask.prompt for ask in asks)


def test_endings_are_listed_by_the_length_that_they_lead_to() -> None:
    found = endings()
    assert sum(map(len, found.values())) == (VOCABULARY - 1) ** 2
    before_last, last = found[7][0]
    assert steps_to_stop(before_last, last) == 7 == greedy_length([1, before_last, last])


def test_only_the_oracle_and_the_control_say_anything_of_lengths() -> None:
    limits = {arm.name: {arm.limit(own, 50) for own in (10, 200)} for arm in ARMS}
    assert limits == {
        "fcfs": {LIMIT},
        "learned": {LIMIT},
        "oracle": {10, 200},
        "shuffled": {LIMIT + 50},
    }
    for arm in ARMS:
        RouterSettings(**arm.router_flags)  # type: ignore[arg-type]
