"""The bandit on planted drafters."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from treecast.services.verifier.choice.bandit import RateBandit

ROUNDS = 2000
STEP_S = 0.020
ACCEPTANCE = {"lookup": 0.2, "small": 0.4, "best": 0.75, "slow": 0.8}
SECONDS = {"lookup": 0.020, "small": 0.022, "best": 0.025, "slow": 0.060}
"""The one that guesses best is not the one that is best: it is too slow."""

Choose = Callable[[RateBandit, np.random.Generator], str]


def expected_rate(arm: str) -> float:
    """Tokens per second of a chain of 4, each accepted with the arm's probability."""
    return sum(ACCEPTANCE[arm] ** depth for depth in range(5)) / SECONDS[arm]


def draw_tokens(arm: str, rng: np.random.Generator) -> int:
    misses = np.flatnonzero(rng.random(4) >= ACCEPTANCE[arm])
    return 1 + (int(misses[0]) if len(misses) else 4)


def by_index(bandit: RateBandit, rng: np.random.Generator) -> str:
    return max(ACCEPTANCE, key=bandit.index)


def uniform(bandit: RateBandit, rng: np.random.Generator) -> str:
    return str(rng.choice(list(ACCEPTANCE)))


def regret_by_quarter(choose: Choose, seed: int) -> list[float]:
    """Tokens per second lost against the best drafter, per round."""
    rng, bandit, lost = np.random.default_rng(seed), RateBandit(), []
    best = max(map(expected_rate, ACCEPTANCE))
    for _ in range(ROUNDS):
        arm = choose(bandit, rng)
        bandit.saw(arm, draw_tokens(arm, rng), SECONDS[arm] * rng.uniform(0.8, 1.2))
        lost.append(best - expected_rate(arm))
    return [float(np.mean(quarter)) for quarter in np.split(np.array(lost), 4)]


def test_planted_best_is_the_one_with_most_tokens_per_second() -> None:
    assert max(ACCEPTANCE, key=expected_rate) == "best"


@pytest.mark.parametrize("seed", range(5))
def test_regret_falls_when_one_drafter_is_best(seed: int) -> None:
    quarters = regret_by_quarter(by_index, seed)
    assert quarters[-1] < 0.5 * quarters[0]


@pytest.mark.parametrize("seed", range(5))
def test_regret_does_not_fall_when_the_choice_is_uniform(seed: int) -> None:
    quarters = regret_by_quarter(uniform, seed)
    assert quarters[-1] > 0.9 * quarters[0]


def test_bandit_follows_when_another_becomes_the_best() -> None:
    bandit = RateBandit()

    def rounds(rates: dict[str, float], count: int) -> list[str]:
        chosen = []
        for _ in range(count):
            chosen.append(max(rates, key=bandit.index))
            bandit.saw(chosen[-1], round(100 * rates[chosen[-1]]), 1.0)
        return chosen

    assert rounds({"a": 1.0, "b": 2.0}, 500)[-100:].count("b") > 90
    assert rounds({"a": 3.0, "b": 2.0}, 1500)[-100:].count("a") > 90


def test_all_are_worth_the_same_while_nothing_is_known() -> None:
    bandit = RateBandit()
    assert bandit.index("a") == bandit.index("b") > 0


def test_bonus_never_more_than_doubles_the_best_rate() -> None:
    bandit = RateBandit()
    for _ in range(1000):
        bandit.saw("known", 50, 1.0)
    assert bandit.index("never tried") == pytest.approx(100.0)


def test_a_request_goes_by_the_others_record_until_it_has_its_own() -> None:
    everyone = RateBandit()
    for _ in range(200):
        everyone.saw("a", 20, 1.0)
        everyone.saw("b", 40, 1.0)
    odd = RateBandit(everyone)
    assert odd.index("b") > odd.index("a")
    for _ in range(60):  # here it is the other way round
        odd.saw("a", 60, 1.0)
        odd.saw("b", 10, 1.0)
    assert odd.index("a") > odd.index("b")


def test_a_drafter_that_is_gone_is_as_new() -> None:
    bandit = RateBandit()
    for _ in range(50):
        bandit.saw("a", 40, 1.0)
        bandit.saw("b", 10, 1.0)
    known = bandit.index("b")
    bandit.forget("b")
    assert bandit.index("b") > known
