"""The circuit breaker, with a clock that the test sets."""

from __future__ import annotations

from treecast.wire.breaker import Breaker


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_breaker_opens_after_failures_in_a_row_and_lets_one_try_after_its_pause() -> None:
    clock = Clock()
    breaker = Breaker(3, 2.0, clock)
    for _ in range(2):
        breaker.failed()
        assert breaker.allows
    breaker.failed()
    assert not breaker.allows
    clock.now_s += 2
    assert breaker.allows
    breaker.trying()
    assert not breaker.allows  # one at a time
    breaker.failed()
    clock.now_s += 1.9
    assert not breaker.allows
    clock.now_s += 0.1
    breaker.trying()
    breaker.succeeded()
    assert breaker.allows
    assert not breaker.tripped


def test_success_in_between_starts_the_count_anew() -> None:
    breaker = Breaker(2, 2.0, Clock())
    for _ in range(5):
        breaker.failed()
        breaker.succeeded()
    assert breaker.allows


def test_trial_of_which_nothing_is_heard_is_given_up_for_the_next() -> None:
    clock = Clock()
    breaker = Breaker(1, 2.0, clock)
    breaker.failed()
    clock.now_s += 2
    breaker.trying()
    clock.now_s += 2
    assert breaker.allows


def test_trying_does_not_hold_others_up_while_it_is_closed() -> None:
    breaker = Breaker(2, 2.0, Clock())
    breaker.failed()
    breaker.trying()
    assert breaker.allows
