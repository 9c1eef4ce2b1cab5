"""What rows cost, as fitted to what was measured."""

from __future__ import annotations

import pytest

from treecast.engine.curve import StepCurve


def test_curve_is_the_line_through_what_was_measured() -> None:
    curve = StepCurve({1: 0.011, 5: 0.015, 21: 0.031})
    assert curve(1) == pytest.approx(0.011)
    assert curve(11) == pytest.approx(0.021)


def test_curve_never_falls_when_measurements_do() -> None:
    curve = StepCurve({1: 0.020, 8: 0.010})
    assert curve(8) >= curve(1) > 0


def test_curve_follows_the_machine_when_it_slows_down() -> None:
    curve = StepCurve({1: 0.010, 11: 0.020})
    for _ in range(1000):
        curve.saw(1, 0.020)
        curve.saw(11, 0.040)
    assert curve(1) == pytest.approx(0.020, rel=0.02)
    assert curve(11) == pytest.approx(0.040, rel=0.02)


def test_curve_ignores_a_step_that_was_disturbed() -> None:
    curve = StepCurve({1: 0.010, 11: 0.020})
    curve.saw(11, 5.0)
    assert curve(11) == pytest.approx(0.020)


def test_curve_follows_the_machine_when_it_becomes_ten_times_slower_at_once() -> None:
    curve = StepCurve({1: 0.010, 11: 0.020})
    for _ in range(4):
        curve.saw(11, 0.200)
    assert curve(11) == pytest.approx(0.020)
    for _ in range(1000):
        curve.saw(1, 0.100)
        curve.saw(11, 0.200)
    assert curve(1) == pytest.approx(0.100, rel=0.02)
    assert curve(11) == pytest.approx(0.200, rel=0.02)
