"""What a second is worth, and whether waiting for trees pays."""

from __future__ import annotations

import pytest

from treecast.services.verifier.goodput import Goodput, worth_waiting


def test_goodput_is_what_one_request_gets_per_second() -> None:
    goodput = Goodput(50.0)
    assert goodput.tokens_per_s == pytest.approx(50.0)
    for _ in range(200):
        goodput.saw(6, 2, 0.030)  # two requests, three tokens each, every 30 ms
    assert goodput.tokens_per_s == pytest.approx(100.0, rel=0.001)


def test_goodput_follows_within_some_steps_when_the_text_changes() -> None:
    goodput = Goodput(100.0)
    for _ in range(200):
        goodput.saw(1, 1, 0.010)
    for _ in range(20):
        goodput.saw(1, 1, 0.020)
    assert 50.0 < goodput.tokens_per_s < 70.0


def test_waiting_pays_while_it_gains_more_than_it_costs() -> None:
    # 100 tokens/s; trees come in 5 ms and so cost half a token.
    assert worth_waiting(1.0, 100, 0.005, 0.020)
    assert not worth_waiting(0.4, 100, 0.005, 0.020)


def test_waiting_ends_when_trees_are_as_late_as_they_are_dear() -> None:
    # They were expected 8 ms ago; another 8 ms would cost 0.8 tokens.
    assert worth_waiting(1.0, 100, -0.008, 0.020)
    assert not worth_waiting(0.7, 100, -0.008, 0.020)


def test_nobody_waits_for_trees_that_come_after_the_wait() -> None:
    assert worth_waiting(9.0, 100, 0.019, 0.020)
    assert not worth_waiting(9.0, 100, 0.021, 0.020)
