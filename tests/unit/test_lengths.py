"""The router's guesses of how long an output will be."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treecast.errors import SettingsError
from treecast.sampling.params import SamplingParams
from treecast.sampling.stops import FinishReason
from treecast.services.router.features import Features
from treecast.services.router.lengths import (
    MAX_MEMORIES,
    REMEMBERED,
    Expected,
    HistoryPredictor,
    LimitPredictor,
    Memory,
    NoPredictor,
    Source,
    predictor_of,
)
from treecast.services.router.server import check_order
from treecast.services.router.settings import RouterSettings

WHOSE = ("tenant", "model", "")
SAMPLING = SamplingParams(max_tokens=1000)
STOPPED = FinishReason.STOP_TOKEN
SHORT, LONG = 10, 400


class Trace:
    """Prompts of two kinds behind one system prompt; the kind alone tells the length."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._system = self._tokens(40)
        self._kinds = [(self._tokens(12), SHORT), (self._tokens(12), LONG)]

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(50_000) for _ in range(count)]

    def prompt(self) -> tuple[list[int], int]:
        words, length = self._rng.choice(self._kinds)
        return [*self._system, *words, *self._tokens(self._rng.randint(2, 12))], length


def follow(predictor: HistoryPredictor, prompts: Sequence[tuple[list[int], int]]) -> list[float]:
    """How far off each guess was, in doublings, learning all the time."""
    errors = []
    for prompt, length in prompts:
        expected = predictor.expect(WHOSE, prompt, SAMPLING)
        errors.append(expected.doublings(length))
        predictor.learn(WHOSE, expected, length, STOPPED)
    return errors


def test_lengths_are_learned_when_prompts_tell_them() -> None:
    trace = Trace(1)
    errors = follow(HistoryPredictor(5), [trace.prompt() for _ in range(300)])
    assert np.mean(errors[100:]) < 0.1
    # Whatever constant were said, it would be off by half of log2(400 / 10) on average.
    assert math.log2(LONG / SHORT) / 2 > 2.6


def test_nothing_is_learned_when_lengths_have_nothing_to_do_with_prompts() -> None:
    """The negative control: the same prompts, each with the length of another."""
    trace, rng = Trace(1), random.Random(2)
    prompts, lengths = zip(*(trace.prompt() for _ in range(300)), strict=True)
    shuffled = rng.sample(lengths, len(lengths))
    errors = follow(HistoryPredictor(5), list(zip(prompts, shuffled, strict=True)))
    assert np.mean(errors[100:]) > 1.5


def test_guess_is_the_limit_then_the_median_then_that_of_alike_prompts() -> None:
    predictor = HistoryPredictor(5)
    trace, rng = Trace(3), random.Random(4)
    prompt, _ = trace.prompt()
    first = predictor.expect(WHOSE, prompt, SAMPLING)
    assert (first.tokens, first.source) == (1000, Source.LIMIT)
    for length in (20, 30, 70):
        strange = [rng.randrange(50_000) for _ in range(50)]
        predictor.learn(WHOSE, predictor.expect(WHOSE, strange, SAMPLING), length, STOPPED)
    missed = predictor.expect(WHOSE, prompt, SAMPLING)
    assert (missed.tokens, missed.source) == (30, Source.TYPICAL)
    predictor.learn(WHOSE, missed, 200, STOPPED)
    found = predictor.expect(WHOSE, prompt, SAMPLING)
    assert (found.tokens, found.source) == (200, Source.ALIKE)


def test_tenants_and_models_learn_apart() -> None:
    predictor = HistoryPredictor(5)
    prompt = list(range(50))
    predictor.learn(WHOSE, predictor.expect(WHOSE, prompt, SAMPLING), 7, STOPPED)
    for whose in (("other", "model", ""), ("tenant", "other", ""), ("tenant", "model", "lora")):
        assert predictor.expect(whose, prompt, SAMPLING).source is Source.LIMIT


@pytest.mark.parametrize("finish", [FinishReason.DEADLINE, FinishReason.CANCELLED])
def test_outputs_that_were_cut_teach_nothing(finish: FinishReason) -> None:
    predictor = HistoryPredictor(5)
    expected = predictor.expect(WHOSE, [1, 2, 3], SAMPLING)
    predictor.learn(WHOSE, expected, 1, finish)
    assert predictor.expect(WHOSE, [1, 2, 3], SAMPLING).source is Source.LIMIT


def test_guess_never_exceeds_the_limit() -> None:
    predictor = HistoryPredictor(5)
    prompt = list(range(50))
    predictor.learn(WHOSE, predictor.expect(WHOSE, prompt, SAMPLING), 900, STOPPED)
    assert predictor.expect(WHOSE, prompt, SamplingParams(max_tokens=513)).tokens == 513


def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    memory, features = Memory(), Features(1)
    prompts = [[number * 30 + at for at in range(30)] for number in range(REMEMBERED + 3)]
    for number, prompt in enumerate(prompts):
        memory.add(features.of(prompt, SAMPLING), number + 1)
    assert len(memory) == REMEMBERED
    newest, oldest = (memory.of_alike(features.of(prompts[at], SAMPLING)) for at in (-1, 0))
    assert newest == pytest.approx(REMEMBERED + 3, rel=0.02)
    assert oldest is None or oldest > 2
    predictor = HistoryPredictor(1)
    for number in range(MAX_MEMORIES + 1):
        whose = (f"tenant-{number}", "model")
        predictor.learn(whose, predictor.expect(whose, [1], SAMPLING), 5, STOPPED)
    assert predictor.expect(("tenant-0", "model"), [1], SAMPLING).source is Source.LIMIT
    assert predictor.expect(("tenant-1", "model"), [1], SAMPLING).source is Source.TYPICAL


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40), st.integers(2, 30))
@settings(deadline=None, max_examples=50)
def test_similarities_equal_those_computed_one_by_one(prompt: list[int], count: int) -> None:
    """The slow oracle of the one product: centre every vector, then take cosines."""
    memory, features, rng = Memory(), Features(9), random.Random(count)
    kept = [features.of([rng.randrange(99) for _ in range(9)], SAMPLING) for _ in range(count)]
    for vector in kept:
        memory.add(vector, 1)
    wanted = features.of(prompt, SAMPLING)
    mean = np.mean(kept, axis=0)
    centred = [vector - mean for vector in (wanted, *kept)]
    slow = [centred[0] @ one / np.linalg.norm(centred[0]) / np.linalg.norm(one) for one in centred]
    assert memory._similarities(wanted) == pytest.approx(slow[1:], abs=2e-3)


def test_vectors_of_different_secrets_have_nothing_in_common() -> None:
    prompt = list(range(1000, 1200))
    one, other = (Features(secret).of(prompt, SAMPLING) for secret in (1, 2))
    assert abs(float(one @ other)) < 0.3
    assert float(one @ Features(1).of(prompt, SAMPLING)) == pytest.approx(1)


def test_guess_doubles_when_the_output_has_outlived_it() -> None:
    expected = Expected(100, 300, Source.ALIKE)
    assert [expected.after(count) for count in (0, 99, 100, 140, 299)] == [100, 100, 200, 280, 300]
    assert [expected.left(count) for count in (0, 99, 100, 140, 299)] == [100, 1, 100, 140, 1]


def test_limit_predictor_says_max_tokens_and_none_says_nothing() -> None:
    assert LimitPredictor().expect(WHOSE, [1], SAMPLING).tokens == 1000
    assert NoPredictor().expect(WHOSE, [1], SAMPLING) is None  # type: ignore[func-returns-value]
    kinds = [type(predictor_of(name)) for name in ("history", "max-tokens", "none")]
    assert kinds == [HistoryPredictor, LimitPredictor, NoPredictor]


def test_order_by_length_is_refused_when_nobody_guesses_lengths() -> None:
    settings = RouterSettings(queue_order="shortest", length_predictor="none")
    with pytest.raises(SettingsError, match="--queue-order is 'shortest' and --length-predictor"):
        check_order(settings)
