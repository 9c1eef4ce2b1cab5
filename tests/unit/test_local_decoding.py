"""The loop in one process, by hand on the toy model: 1, 2 goes on with 8, 27, 90, 7, 15, 53."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from treecast.decoding.local import Request, generate, generate_together
from treecast.drafting.base import Drafter
from treecast.drafting.growth import ExpansionVector
from treecast.drafting.ssm import SSMDrafter
from treecast.engine.base import Segment
from treecast.engine.toy import ToyEngine, toy_logits
from treecast.errors import InvalidRequest, InvalidTree, Overloaded, PromptTooLong
from treecast.sampling.noise import noise_key
from treecast.sampling.params import Law, SamplingParams, SpeculationParams
from treecast.sampling.pick import Picker
from treecast.sampling.stops import FinishReason, Stop
from treecast.sampling.transforms import Context

from .toy_drafter import ToyDrafter

PROMPT = [1, 2]
SIX = [8, 27, 90, 7, 15, 53]
GREEDY_6 = SamplingParams(temperature=0, max_tokens=6)
KEY = noise_key(3)


def test_output_is_that_worked_out_by_hand_when_decoding_plainly() -> None:
    engine = ToyEngine()
    done = generate(engine, PROMPT, GREEDY_6, KEY)
    assert done.tokens == SIX
    assert done.stop == Stop(FinishReason.LENGTH)
    assert (done.steps, done.drafted, done.accepted) == (6, 0, 0)
    assert (engine.num_passes, engine.num_rows) == (7, 7)
    assert engine.usage.free == engine.usage.total


def test_steps_are_fewer_when_a_draft_is_right() -> None:
    # Chains of 2: three tokens a step.
    done = generate(ToyEngine(), PROMPT, GREEDY_6, KEY, ToyDrafter(width=1, max_depth=2))
    assert done.tokens == SIX
    assert (done.steps, done.drafted, done.accepted) == (2, 4, 4)
    assert done.accepted_by_depth[:3] == [2, 2, 0]


def test_trees_end_where_the_output_must_when_few_tokens_are_left() -> None:
    # Five of chain and a bonus; with a deeper chain there would be rows for nothing.
    done = generate(ToyEngine(), PROMPT, GREEDY_6, KEY, ToyDrafter(width=1, max_depth=32))
    assert done.tokens == SIX
    assert (done.steps, done.drafted, done.accepted) == (1, 5, 5)


def test_output_is_the_same_when_every_draft_is_wrong() -> None:
    done = generate(ToyEngine(), PROMPT, GREEDY_6, KEY, ToyDrafter(error_rate=1))
    assert done.tokens == SIX
    assert (done.steps, done.accepted) == (6, 0)
    assert done.drafted > 0


def by_definition(prompt: Sequence[int], sampling: SamplingParams, key: int) -> list[int]:
    """No engine, no tree: the model's row of the whole text, and `pick`."""
    picker, text = Picker(sampling, key, Context(prompt)), list(prompt)
    for _ in range(sampling.max_tokens):
        text.append(picker.pick(toy_logits(text, 97)))
        picker.accept(text[-1])
    return text[len(prompt) :]


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 2.5, "top_p": 0.95},
    {"temperature": 3.0, "top_k": 5, "min_p": 0.02},
    {"temperature": 1.5, "repetition_penalty": 1.2, "presence_penalty": 0.4},
]
DRAFTERS = [None, ToyDrafter(), ToyDrafter(error_rate=0.4, width=3), ToyDrafter(error_rate=1)]


@pytest.mark.parametrize("values", SAMPLINGS, ids=str)
@pytest.mark.parametrize("drafter", DRAFTERS, ids=["plain", "right", "noisy", "wrong"])
def test_output_depends_on_prompt_and_key_alone(
    values: dict[str, Any], drafter: Drafter | None
) -> None:
    engine = ToyEngine()
    prompt = list(range(2, 95))
    for seed in range(4):
        sampling = SamplingParams(max_tokens=40, **values)
        done = generate(engine, prompt, sampling, noise_key(seed), drafter, max_nodes=12)
        assert done.tokens == by_definition(prompt, sampling, noise_key(seed))
        assert len(done.tokens) == done.steps + done.accepted
        assert sum(done.accepted_by_depth) == done.accepted
    assert engine.usage.free == engine.usage.total


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 1000])
def test_output_is_the_same_when_the_prompt_comes_in_other_chunks(chunk_tokens: int) -> None:
    prompt, sampling = list(range(2, 95)), SamplingParams(temperature=2, max_tokens=8)
    done = generate(ToyEngine(), prompt, sampling, KEY, chunk_tokens=chunk_tokens)
    assert done.tokens == by_definition(prompt, sampling, KEY)


def test_output_differs_when_the_key_does() -> None:
    sampling = SamplingParams(temperature=2, max_tokens=20)
    one, other = (generate(ToyEngine(), PROMPT, sampling, noise_key(s)).tokens for s in (0, 1))
    assert one != other


@pytest.mark.parametrize("drafter", [None, ToyDrafter(width=1, max_depth=5)], ids=["plain", "tree"])
@pytest.mark.parametrize(
    ("values", "eos", "expected", "stop"),
    [
        ({}, [90], SIX[:3], Stop(FinishReason.STOP_TOKEN)),
        ({"ignore_eos": True}, [90], SIX, Stop(FinishReason.LENGTH)),
        ({"stop_token_ids": (7,)}, [], SIX[:4], Stop(FinishReason.STOP_TOKEN)),
        ({"stop": ("7 9",)}, [], SIX[:3], Stop(FinishReason.STOP_STRING, 5)),
        ({"max_tokens": 4}, [], SIX[:4], Stop(FinishReason.LENGTH)),
        ({"max_tokens": 1}, [], SIX[:1], Stop(FinishReason.LENGTH)),
    ],
    ids=["eos", "ignored eos", "stop id", "stop string", "length", "length 1"],
)
def test_output_ends_where_it_should_inside_an_accepted_path_too(
    drafter: Drafter | None,
    values: dict[str, Any],
    eos: list[int],
    expected: list[int],
    stop: Stop,
) -> None:
    engine = ToyEngine(eos_token_ids=eos)
    sampling = SamplingParams(**{"temperature": 0, "max_tokens": 6, **values})
    done = generate(engine, PROMPT, sampling, KEY, drafter, decode=spell)
    assert (done.tokens, done.stop) == (expected, stop)
    assert engine.usage.free == engine.usage.total


def spell(tokens: Sequence[int]) -> str:
    return "".join(f"{token} " for token in tokens)


def test_logprobs_are_one_per_token_when_asked_for() -> None:
    sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=1)
    done = generate(ToyEngine(), PROMPT, sampling, KEY, ToyDrafter())
    assert [entry.top_ids for entry in done.logprobs] == [(token,) for token in SIX]


@pytest.mark.parametrize(
    ("prompt", "values", "error", "message"),
    [
        ([], {}, InvalidRequest, "prompt is empty"),
        ([5, 97], {}, InvalidRequest, "token id 97 is unknown; the vocabulary has 97"),
        ([-1], {}, InvalidRequest, "token id -1 is unknown; the vocabulary has 97"),
        (
            [5],
            {"stop_token_ids": (99,)},
            InvalidRequest,
            "token id in stop_token_ids is 99; allowed: below the vocabulary size 97",
        ),
        (
            [5] * 10,
            {"max_tokens": 7},
            PromptTooLong,
            "prompt has 10 tokens and max_tokens is 7; the limit is 16 together",
        ),
    ],
)
def test_generate_refuses_what_the_model_cannot_answer(
    prompt: list[int], values: dict[str, Any], error: type[Exception], message: str
) -> None:
    engine = ToyEngine(context_tokens=16)
    sampling = SamplingParams(**{"max_tokens": 6, **values})
    with pytest.raises(error) as refused:
        generate(engine, prompt, sampling, KEY)
    assert str(refused.value) == message
    assert engine.num_passes == 0


def test_generate_fills_the_context_to_the_last_position() -> None:
    engine = ToyEngine(context_tokens=16)
    sampling = SamplingParams(temperature=0, max_tokens=6)
    assert len(generate(engine, [5] * 10, sampling, KEY, ToyDrafter(max_depth=32)).tokens) == 6


def test_pages_and_draft_session_are_freed_when_a_pass_fails() -> None:
    def fail(segments: Sequence[Segment]) -> None:
        if engine.num_passes == 2:
            raise OSError("device lost")

    engine, drafter = ToyEngine(on_forward=fail), ToyDrafter(width=1, max_depth=1)
    with pytest.raises(OSError, match="device lost"):
        generate(engine, PROMPT, GREEDY_6, KEY, drafter)
    assert engine.usage.free == engine.usage.total
    assert drafter.num_sessions == 0


def test_pages_are_freed_when_the_drafter_is_full() -> None:
    engine = ToyEngine()
    with pytest.raises(Overloaded):
        generate(engine, PROMPT, GREEDY_6, KEY, ToyDrafter(capacity=0))
    assert engine.usage.free == engine.usage.total


def test_everything_is_freed_when_one_of_several_is_refused() -> None:
    engine, drafter = ToyEngine(), ToyDrafter()
    with pytest.raises(InvalidRequest):
        generate_together(engine, [Request(p, GREEDY_6, KEY) for p in (PROMPT, [])], drafter)
    assert engine.usage.free == engine.usage.total
    assert drafter.num_sessions == 0


# --- the law mss --------------------------------------------------------------------------------

MSS = SpeculationParams.of(Law.MSS)


def test_nearly_every_path_is_accepted_when_draws_are_from_the_targets_law() -> None:
    drafter = SSMDrafter(ToyEngine(), ExpansionVector((1, 1, 1)))
    noisy = SamplingParams(max_tokens=40)
    done = generate(ToyEngine(), PROMPT, noisy, KEY, drafter, speculation=MSS)
    # The draft differs from the target by the mass that its cut leaves out, below 1e-13.
    assert (len(done.tokens), done.steps, done.accepted) == (40, 10, 30)
    assert done.tokens != generate(ToyEngine(), PROMPT, noisy, KEY).tokens


def test_output_is_that_worked_out_by_hand_when_mss_is_greedy() -> None:
    drafter = SSMDrafter(ToyEngine(), ExpansionVector((2, 2)))
    assert generate(ToyEngine(), PROMPT, GREEDY_6, KEY, speculation=MSS).tokens == SIX
    done = generate(ToyEngine(), PROMPT, GREEDY_6, KEY, drafter, speculation=MSS)
    assert (done.tokens, done.steps) == (SIX, 2)


def test_tree_is_refused_when_it_carries_no_draws() -> None:
    with pytest.raises(InvalidTree, match="node 0 is no draw of a group"):
        generate(ToyEngine(), PROMPT, GREEDY_6, KEY, ToyDrafter(), speculation=MSS)


def test_answers_are_those_of_each_alone_when_several_are_decoded_together() -> None:
    """Other lengths, samplings and laws, and a draft: only the passes are fewer."""
    requests = [
        Request(PROMPT, GREEDY_6, KEY),
        Request([5], SamplingParams(temperature=1, max_tokens=17), noise_key(4)),
        Request([3, 4, 9], SamplingParams(temperature=1, max_tokens=11), noise_key(5), MSS),
        Request([8], GREEDY_6, KEY, SpeculationParams(max_nodes=0)),
    ]

    def drafter() -> SSMDrafter:
        return SSMDrafter(ToyEngine(), ExpansionVector((2, 2)))

    alone, together = ToyEngine(), ToyEngine()
    expected = [
        generate(
            alone,
            each.prompt,
            each.sampling,
            each.noise_key,
            drafter(),
            speculation=each.speculation,
        )
        for each in requests
    ]
    assert generate_together(together, requests, drafter()) == expected
    assert [done.accepted > 0 for done in expected] == [True, True, True, False]
    assert together.num_passes == 2 + max(done.steps for done in expected)  # two have a prefill
    assert together.usage.free == together.usage.total
