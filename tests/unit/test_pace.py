"""What rows cost, and whether waiting for trees pays."""

from __future__ import annotations

import pytest

from treecast.services.verifier.pace import StepCurve, worth_waiting


def test_curve_is_linear_between_points_and_never_falls() -> None:
    curve = StepCurve({1: 0.010, 4: 0.016, 8: 0.014})
    assert curve(1) == pytest.approx(0.010)
    assert curve(2) == pytest.approx(0.012)
    assert curve(8) == pytest.approx(0.016)
    assert curve(100) == pytest.approx(0.016)


def test_curve_follows_what_is_seen() -> None:
    curve = StepCurve({1: 0.010, 8: 0.020})
    for _ in range(200):
        curve.saw(8, 0.040)
    assert curve(8) == pytest.approx(0.040, rel=0.01)
    assert curve(1) == pytest.approx(0.010)


def test_waiting_pays_while_it_gains_more_than_it_costs() -> None:
    # 100 tokens/s; trees come in 5 ms and so cost half a token.
    assert worth_waiting(1.0, 100, 0.005, 0.020)
    assert not worth_waiting(0.4, 100, 0.005, 0.020)


def test_waiting_ends_when_trees_are_as_late_as_they_are_dear() -> None:
    # They were expected 8 ms ago; another 8 ms would cost 0.8 tokens.
    assert worth_waiting(1.0, 100, -0.008, 0.020)
    assert not worth_waiting(0.7, 100, -0.008, 0.020)
