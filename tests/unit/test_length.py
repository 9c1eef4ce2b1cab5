"""Adaptive length against brute force, and that it keeps still."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from treecast.engine.curve import StepCurve
from treecast.services.verifier.choice.length import AcceptanceTrend, AdaptiveLength

MAX_LENGTH = 16
CHAIN = [0] * MAX_LENGTH


def flat(depth: int) -> float:
    return 0.8


def poor(depth: int) -> float:
    return 0.35


def falling(depth: int) -> float:
    return max(0.05, 0.9 - 0.08 * depth)


def expected(acceptance: Callable[[int], float]) -> list[float]:
    survival = np.cumprod([acceptance(depth) for depth in range(MAX_LENGTH)])
    return [1.0, *(1 + np.cumsum(survival))]


def step_s(length: int) -> float:
    return 0.012 + 0.0012 * length


def steep_s(length: int) -> float:
    return 0.010 + 0.004 * length


def cost(length: int, acceptance: Callable[[int], float], seconds: Callable[[int], float]) -> float:
    return seconds(length) / expected(acceptance)[length]


def optimum(acceptance: Callable[[int], float], seconds: Callable[[int], float]) -> int:
    return min(range(1, MAX_LENGTH + 1), key=lambda n: cost(n, acceptance, seconds))


def run(
    acceptance: Callable[[int], float],
    seconds: Callable[[int], float],
    margin: float,
    steps: int = 1500,
) -> list[int]:
    """Lengths in use, step by step; acceptance is drawn, and step times have 10% noise."""
    rng = np.random.default_rng(7)
    curve = StepCurve({rows: seconds(rows - 1) * rng.normal(1, 0.1) for rows in (1, 2, 4, 8, 16)})
    trend, length = AcceptanceTrend(MAX_LENGTH), AdaptiveLength(MAX_LENGTH, margin)
    used = []
    for _ in range(steps):
        misses = [d for d in range(MAX_LENGTH) if rng.random() >= acceptance(d)]
        accepted = min([*misses, length.value])  # no deeper than what was verified
        trend.saw(CHAIN, [0] * accepted + [int(accepted in misses)])
        curve.saw(1 + length.value, seconds(length.value) * rng.normal(1, 0.1))
        used.append(length.update(lambda n: curve(1 + n), trend.expected_tokens()))
    return used


def changes(used: list[int]) -> int:
    return sum(a != b for a, b in itertools.pairwise(used))


@pytest.mark.parametrize("acceptance", [flat, poor, falling])
@pytest.mark.parametrize("seconds", [step_s, steep_s])
def test_length_converges_to_the_brute_force_optimum(
    acceptance: Callable[[int], float], seconds: Callable[[int], float]
) -> None:
    settled = run(acceptance, seconds, margin=0.03)[-1]
    best = optimum(acceptance, seconds)
    assert cost(settled, acceptance, seconds) <= 1.05 * cost(best, acceptance, seconds)


def test_length_is_the_optimum_when_nothing_is_noise() -> None:
    for acceptance in (flat, poor, falling):
        length = AdaptiveLength(MAX_LENGTH, margin=0.0)
        assert length.update(steep_s, expected(acceptance)) == optimum(acceptance, steep_s)


def test_length_keeps_still_under_noise_and_flaps_without_a_margin() -> None:
    steady = run(flat, step_s, margin=0.03, steps=3000)[500:]
    restless = run(flat, step_s, margin=0.0, steps=3000)[500:]
    assert changes(steady) <= 2
    assert changes(restless) >= 10


def test_deep_positions_follow_the_trend_when_they_were_never_reached() -> None:
    trend = AcceptanceTrend(4)
    for _ in range(400):  # depth 1: 3 of 4 accepted; depth 2: 1 of 3
        for tokens in ([1], [0, 1], [0, 1], [0, 0]):
            trend.saw([0, 0], tokens)
    yields = trend.expected_tokens()
    assert yields[1] - yields[0] == pytest.approx(0.75, abs=0.02)
    assert (yields[2] - yields[1]) / 0.75 == pytest.approx(1 / 3, abs=0.02)
    assert yields[3] - yields[2] < 0.02  # the line falls below 0 there


def test_length_is_never_zero() -> None:
    length = AdaptiveLength(MAX_LENGTH)
    assert length.update(lambda n: 1.0 + 10 * n, expected(poor)) == 1
