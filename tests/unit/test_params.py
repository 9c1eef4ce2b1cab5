"""What a request may ask, and how a refusal reads."""

from __future__ import annotations

import math
from typing import Any

import pytest

from treecast.errors import InvalidRequest
from treecast.sampling.params import SamplingParams


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; allowed: 0..100"),
        ({"temperature": 100.5}, "temperature is 100.5; allowed: 0..100"),
        ({"temperature": math.nan}, "temperature is nan; allowed: finite"),
        ({"temperature": math.inf}, "temperature is inf; allowed: finite"),
        ({"top_k": -1}, "top_k is -1; allowed: 0 or more"),
        ({"top_p": 0.0}, "top_p is 0.0; allowed: (0, 1]"),
        ({"top_p": 1.01}, "top_p is 1.01; allowed: (0, 1]"),
        ({"top_p": math.nan}, "top_p is nan; allowed: finite"),
        ({"min_p": -0.5}, "min_p is -0.5; allowed: 0..1"),
        ({"min_p": 1.5}, "min_p is 1.5; allowed: 0..1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; allowed: 0.01..10"),
        ({"repetition_penalty": 10.5}, "repetition_penalty is 10.5; allowed: 0.01..10"),
        ({"presence_penalty": -math.inf}, "presence_penalty is -inf; allowed: finite"),
        ({"presence_penalty": 101.0}, "presence_penalty is 101.0; allowed: -100..100"),
        ({"frequency_penalty": -101.0}, "frequency_penalty is -101.0; allowed: -100..100"),
        ({"logit_bias": {5: math.nan}}, "logit_bias of token 5 is nan; allowed: -1e9..1e9"),
        ({"logit_bias": {5: 1e300}}, "logit_bias of token 5 is 1e+300; allowed: -1e9..1e9"),
        (
            {"logit_bias": dict.fromkeys(range(1025), 1.0)},
            "number of logit_bias entries is 1025; allowed: at most 1024",
        ),
        ({"seed": -1}, "seed is -1; allowed: 0..2**64-1"),
        ({"seed": 2**64}, "seed is 18446744073709551616; allowed: 0..2**64-1"),
        ({"max_tokens": 0}, "max_tokens is 0; allowed: 1 or more"),
        ({"max_tokens": -7}, "max_tokens is -7; allowed: 1 or more"),
        ({"stop": ("",)}, "length of a stop string is 0; allowed: 1..256 characters"),
        ({"stop": ("a" * 257,)}, "length of a stop string is 257; allowed: 1..256 characters"),
        ({"stop": ("a",) * 17}, "number of stop strings is 17; allowed: at most 16"),
        ({"stop": "\n"}, "stop is '\\n'; allowed: a sequence of strings"),
        ({"stop_token_ids": range(65)}, "number of stop_token_ids is 65; allowed: at most 64"),
        ({"logprobs": 21}, "logprobs is 21; allowed: 0..20"),
        ({"logprobs": -1}, "logprobs is -1; allowed: 0..20"),
    ],
    ids=lambda case: "-".join(case) if isinstance(case, dict) else "",
)
def test_params_refuse_with_value_and_bound_when_out_of_range(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        SamplingParams(**values)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0},
        {"temperature": 100, "min_p": 1, "repetition_penalty": 10, "logprobs": 20},
        {"seed": 2**64 - 1, "logit_bias": {0: -1e9}, "stop": ("a" * 256,) * 16},
    ],
)
def test_params_accept_the_bounds_themselves(values: dict[str, Any]) -> None:
    SamplingParams(**values)


def test_params_are_equal_when_stops_came_as_lists() -> None:
    as_lists: Any = {"stop": ["\n"], "stop_token_ids": [3]}
    assert SamplingParams(**as_lists) == SamplingParams(stop=("\n",), stop_token_ids=(3,))


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (
            SamplingParams(logit_bias={97: 1.0}),
            "token id in logit_bias is 97; allowed: below the vocabulary size 97",
        ),
        (
            SamplingParams(stop_token_ids=(-1,)),
            "token id in stop_token_ids is -1; allowed: below the vocabulary size 97",
        ),
    ],
)
def test_vocabulary_check_names_the_id_when_the_model_lacks_it(
    sampling: SamplingParams, message: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        sampling.check_vocabulary(97)
    assert str(refused.value) == message
