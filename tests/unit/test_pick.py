"""`pick` against exact probabilities, and its pruning against the full sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats

from treecast.errors import TreecastError
from treecast.sampling import pick as pick_module
from treecast.sampling.logprobs import token_logprobs
from treecast.sampling.noise import gumbel, gumbel_of, noise_key
from treecast.sampling.params import SamplingParams
from treecast.sampling.pick import Picker, perturbed_argmax, pick
from treecast.sampling.transforms import Candidates, Context

GREEDY = SamplingParams(temperature=0)
KEY = noise_key(11)
NUM_DRAWS = 20_000


def row(*logits: float) -> NDArray[np.float32]:
    return np.array(logits, np.float32)


def test_pick_takes_the_lowest_id_when_logits_tie_at_temperature_0() -> None:
    assert pick(row(1, 3, 3, 2), Context([0]), GREEDY, KEY) == 1


def test_pick_has_no_noise_when_temperature_rounds_to_0() -> None:
    sampling = SamplingParams(temperature=1e-60)
    assert pick(row(1, 3, 3, 2), Context([0]), sampling, KEY) == 1


def test_pick_ignores_warpers_but_not_penalties_when_greedy() -> None:
    sampling = SamplingParams(temperature=0, top_k=1, top_p=0.1, min_p=0.9, repetition_penalty=2)
    assert pick(row(1, 3, 2), Context([1]), sampling, KEY) == 2


def test_pick_adds_the_noise_of_position_and_token_when_sampling() -> None:
    logits = np.random.default_rng(0).normal(0, 1, 50).astype(np.float32)
    for length in range(1, 40):
        perturbed = logits.astype(np.float64) + gumbel(KEY, length, 50)
        assert pick(logits, Context([0] * length), SamplingParams(), KEY) == perturbed.argmax()


def test_pick_ties_go_to_the_lowest_id_when_noise_is_equal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pick_module, "gumbel_of", lambda key, position, ids: np.zeros(len(ids)))
    assert pick(row(1, 3, 3, 2), Context([0]), SamplingParams(), KEY) == 1


def test_pick_is_unmoved_when_other_picks_come_between() -> None:
    logits = np.random.default_rng(1).normal(0, 2, 500).astype(np.float32)
    context = Context([1, 2, 3])
    first = pick(logits, context, SamplingParams(), KEY)
    pick(logits[::-1].copy(), Context([5]), SamplingParams(top_p=0.5), KEY + 1)
    assert pick(logits, context, SamplingParams(), KEY) == first


def test_picker_moves_on_when_a_token_is_accepted() -> None:
    picker = Picker(SamplingParams(temperature=0, presence_penalty=5), KEY, Context([0]))
    logits = row(0, 3, 1)
    assert (picker.pick(logits), picker.pick(logits)) == (1, 1)
    picker.accept(1)
    assert (picker.pick(logits), picker.context.length) == (2, 2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_pick_names_the_position_when_the_model_broke_down(bad: float, temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature)
    with pytest.raises(TreecastError) as broken:
        pick(row(1, bad, 2), Context([0] * 7), sampling, KEY)
    assert str(broken.value) == f"the largest logit at position 7 is {bad}"


# --- the law ----------------------------------------------------------------------------------


def draws(logits: NDArray[np.float32], sampling: SamplingParams) -> NDArray[np.int64]:
    """How often each token is picked over many positions."""
    context = Context([])
    counts = np.zeros(len(logits), np.int64)
    for position in range(NUM_DRAWS):
        context.length = position
        counts[pick(logits, context, sampling, KEY)] += 1
    return counts


def p_value(counts: NDArray[np.int64], probs: NDArray[np.float64]) -> float:
    """Of the chi-square test; tokens expected fewer than 5 times count together."""
    assert counts[probs == 0].sum() == 0
    common = probs * NUM_DRAWS >= 5
    observed = [*counts[common], counts[~common].sum()]
    expected = [*(probs[common] * NUM_DRAWS), probs[~common].sum() * NUM_DRAWS]
    if expected[-1] == 0:
        del observed[-1], expected[-1]
    return float(stats.chisquare(observed, expected).pvalue)


def exact_probs(logits: NDArray[np.float32], kept: list[int], temperature: float) -> Any:
    """The softmax over the kept tokens."""
    masked = np.full(len(logits), -np.inf)
    masked[kept] = logits[kept] / temperature
    return special.softmax(masked)


LOGITS = np.random.default_rng(21).normal(0, 1.5, 40).astype(np.float32)
DESCENDING = np.argsort(-LOGITS).tolist()


def nucleus(temperature: float, top_p: float) -> list[int]:
    """By the definition, one token after the other."""
    probs = special.softmax(LOGITS.astype(np.float64) / temperature)
    kept: list[int] = []
    for token in DESCENDING:
        if probs[kept].sum() >= top_p:
            break
        kept.append(token)
    return kept


OFTEN_ENOUGH = [t for t in DESCENDING if LOGITS[t] >= LOGITS.max() + np.log(0.2)]
CASES = [
    pytest.param({}, DESCENDING, 1.0, marks=pytest.mark.slow, id="all"),
    pytest.param({"temperature": 0.7, "top_p": 0.9}, nucleus(0.7, 0.9), 0.7, id="top-p"),
    pytest.param({"top_k": 7}, DESCENDING[:7], 1.0, marks=pytest.mark.slow, id="top-k"),
    pytest.param({"min_p": 0.2}, OFTEN_ENOUGH, 1.0, marks=pytest.mark.slow, id="min-p"),
]


@pytest.mark.parametrize(("values", "kept", "temperature"), CASES)
def test_pick_follows_the_exact_probabilities(
    values: dict[str, Any], kept: list[int], temperature: float
) -> None:
    counts = draws(LOGITS, SamplingParams(**values))
    assert p_value(counts, exact_probs(LOGITS, kept, temperature)) > 1e-3


def test_law_is_told_apart_when_the_temperature_is_off_by_a_tenth() -> None:
    counts = draws(LOGITS, SamplingParams(temperature=1.1))
    assert p_value(counts, exact_probs(LOGITS, DESCENDING, 1.0)) < 1e-6


# --- the pruning ------------------------------------------------------------------------------


def full_argmax(candidates: Candidates, position: int) -> int:
    noise = gumbel_of(KEY, position, candidates.ids)
    return int(candidates.ids[(candidates.scores + noise).argmax()])


def deep(num_tokens: int, gap: float, position: int) -> Candidates:
    """One likely token above many unlikely ones, of which some noise may lift one to the top."""
    scores = np.random.default_rng(position).normal(-gap, 0.5, num_tokens)
    scores[position % num_tokens] = 0
    return Candidates(np.arange(num_tokens), scores)


@pytest.mark.parametrize("gap", [0, 4, 9, 18, 21, 22, 30])
def test_pruned_argmax_equals_the_full_one_when_unlikely_tokens_are_many(gap: float) -> None:
    for position in range(60):
        candidates = deep(20_000, gap, position)
        expected = full_argmax(candidates, position)
        assert perturbed_argmax(candidates, KEY, position) == expected


def test_pruned_argmax_equals_the_full_one_when_a_score_barely_wins_or_loses() -> None:
    position, vocab_size = 5, 20_000
    noise = gumbel(KEY, position, vocab_size).astype(np.float64)
    lucky = int(noise.argmax())
    likely = 17
    for nudge in (-1e-9, 0.0, 1e-9):
        scores = np.full(vocab_size, -1000.0)
        scores[likely] = 0.0
        scores[lucky] = noise[likely] - noise[lucky] + nudge
        candidates = Candidates(np.arange(vocab_size), scores)
        expected = full_argmax(candidates, position)
        assert perturbed_argmax(candidates, KEY, position) == expected
        assert expected == (lucky if nudge > 0 else min(likely, lucky) if nudge == 0 else likely)


def test_pruning_goes_wrong_when_the_bound_is_too_low(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pick_module, "GUMBEL_MAX", 8.0)
    wrong = 0
    for position in range(60):
        candidates = deep(20_000, 9, position)
        wrong += perturbed_argmax(candidates, KEY, position) != full_argmax(candidates, position)
    assert wrong > 10


# --- logprobs ---------------------------------------------------------------------------------


def test_logprobs_are_of_the_plain_softmax_with_ties_to_the_lowest_id() -> None:
    logits = np.log(row(0.1, 0.2, 0.4, 0.2, 0.1))
    reported = token_logprobs(logits, token=4, num_top=4)
    assert reported.chosen == pytest.approx(np.log(0.1), abs=1e-6)
    assert reported.top_ids == (2, 1, 3, 0)
    assert reported.top == pytest.approx(np.log([0.4, 0.2, 0.2, 0.1]), abs=1e-6)


def test_logprobs_name_no_tokens_when_none_are_asked_for() -> None:
    assert token_logprobs(row(0, 0), token=1, num_top=0).top_ids == ()
    assert token_logprobs(row(0, 0), token=1, num_top=9).top_ids == (0, 1)
