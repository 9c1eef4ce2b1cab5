"""Transforms by hand, and against transformers' own processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from treecast.sampling.params import SamplingParams
from treecast.sampling.transforms import Context, process, warp

ROW = np.array([2.0, -1.0, 0.5, 0.0, 1.0], np.float32)


def kept(row: NDArray[np.float32], **values: Any) -> list[int]:
    return [int(token) for token in warp(row, SamplingParams(**values)).ids]


def test_context_counts_positions_and_output_when_tokens_are_appended() -> None:
    context = Context([4, 4, 1], [2])
    context.append(2)
    context.append(1)
    ids, counts = context.output_counts()
    assert context.length == 6
    assert sorted(context.seen().tolist()) == [1, 2, 4]
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {2: 2.0, 1: 1.0}


def test_process_returns_the_row_itself_when_nothing_is_asked() -> None:
    assert process(ROW, Context([0]), SamplingParams(temperature=0.3, top_k=2)) is ROW


def test_repetition_penalty_divides_or_multiplies_when_tokens_are_in_prompt_or_output() -> None:
    row = process(ROW, Context([0, 1], [2]), SamplingParams(repetition_penalty=2.0))
    assert row.tolist() == [1.0, -2.0, 0.25, 0.0, 1.0]


def test_output_penalties_subtract_when_tokens_are_in_the_output_alone() -> None:
    context = Context([0, 4], [2, 2, 3])
    sampling = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    assert process(ROW, context, sampling).tolist() == [2.0, -1.0, -0.5, -0.75, 1.0]


def test_bias_precedes_penalties_when_both_are_asked() -> None:
    sampling = SamplingParams(logit_bias={0: 2.0, 3: -1.0}, repetition_penalty=2.0)
    assert process(ROW, Context([0, 3]), sampling).tolist() == [2.0, -1.0, 0.5, -2.0, 1.0]


def test_process_leaves_the_row_alone_when_it_changes_scores() -> None:
    before = ROW.copy()
    process(ROW, Context([0]), SamplingParams(repetition_penalty=2.0, logit_bias={1: 3.0}))
    assert ROW.tolist() == before.tolist()


def test_top_k_keeps_ties_when_they_equal_the_kth() -> None:
    assert kept(np.array([1, 3, 1, 2, 1], np.float32), top_k=3) == [0, 1, 2, 3, 4]
    assert kept(ROW, top_k=2) == [0, 4]
    assert kept(ROW, top_k=9) == [0, 1, 2, 3, 4]


def test_top_p_keeps_the_token_that_crosses_when_mass_is_summed_from_the_top() -> None:
    row = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    assert kept(row, top_p=0.39) == [1]
    assert kept(row, top_p=0.41) == [1, 3]
    assert kept(row, top_p=0.71) == [1, 2, 3]
    assert kept(row, top_p=0.95) == [0, 1, 2, 3]
    assert kept(row, top_p=1e-30) == [1]


def test_top_p_keeps_the_lowest_ids_when_tokens_tie_at_the_edge() -> None:
    assert kept(np.zeros(8, np.float32), top_p=0.5) == [0, 1, 2, 3]
    assert kept(np.array([0, 9, 0, 9, 0], np.float32), top_p=0.3) == [1]


def test_min_p_compares_with_the_likeliest() -> None:
    row = np.log(np.array([0.5, 0.26, 0.24], np.float32))
    assert kept(row, min_p=0.5) == [0, 1]
    assert kept(row, min_p=1.0) == [0]
    assert kept(row, min_p=1e-50) == [0, 1, 2]


def test_temperature_precedes_top_p_when_both_are_asked() -> None:
    row = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    assert kept(row, top_p=0.7) == [0, 1]
    assert kept(row, top_p=0.7, temperature=0.25) == [0]


def test_top_p_sees_what_top_k_left_when_both_are_asked() -> None:
    row = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    assert kept(row, top_p=0.5) == [0, 1]
    assert kept(row, top_p=0.5, top_k=2) == [0]  # 4/7 of what is left
    assert kept(row, min_p=0.6, top_p=0.5) == [0, 1]


def test_scores_are_finite_when_temperature_is_the_smallest_float32() -> None:
    scores = warp(ROW, SamplingParams(temperature=1.5e-45, top_p=0.9)).scores
    assert np.isfinite(scores).all()


# --- against transformers ---------------------------------------------------------------------


def theirs(row: NDArray[np.float32], text: list[int], sampling: SamplingParams) -> Any:
    """The row after the processors that `generate` would build for this request, in its order."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    chain = transformers.LogitsProcessorList()
    if sampling.logit_bias:
        bias = {(token,): value for token, value in sampling.logit_bias.items()}
        chain.append(transformers.SequenceBiasLogitsProcessor(bias))
    if sampling.repetition_penalty != 1:
        chain.append(transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1:
        chain.append(transformers.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(transformers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(transformers.MinPLogitsWarper(sampling.min_p))
    return chain(torch.tensor([text]), torch.tensor(row)[None])[0].numpy()


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.7},
        {"top_k": 50},
        {"top_p": 0.9},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"logit_bias": {3: 4.5, 9: -100.0}},
        {"temperature": 1.4, "top_k": 400, "top_p": 0.8, "min_p": 0.02},
        {
            "temperature": 0.6,
            "top_k": 90,
            "top_p": 0.95,
            "min_p": 0.01,
            "repetition_penalty": 0.8,
            "logit_bias": {3: 4.5, 9: -100.0},
        },
    ],
    ids=lambda values: "+".join(values),
)
def test_transforms_equal_those_of_transformers_when_rows_are_random(
    values: dict[str, Any],
) -> None:
    rng, sampling = np.random.default_rng(8), SamplingParams(**values)
    for _ in range(25):
        row = rng.normal(0, 3, 1000).astype(np.float32)
        text = rng.integers(0, 1000, 60).tolist()
        expected = theirs(row, text, sampling)
        candidates = warp(process(row, Context(text[:40], text[40:]), sampling), sampling)
        assert candidates.ids.tolist() == np.flatnonzero(expected > -np.inf).tolist()
        np.testing.assert_allclose(candidates.scores, expected[candidates.ids], rtol=1e-6)
