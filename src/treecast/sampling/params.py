"""What a request asks of decoding."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from treecast.draws import DRAWN
from treecast.draws import Proposal as Proposal
from treecast.errors import InvalidRequest

_BOUNDS = {
    "temperature": (0, 100),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 10),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
}
_MAX_BIAS = 1e9
_MAX_BIASES = 1024
_MAX_STOPS = 16
_MAX_STOP_CHARACTERS = 256
_MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MAX_GROWTH_CHARACTERS = 256
MAX_CONSTRAINT_CHARACTERS = 65536
CONSTRAINTS = ("json_schema", "regex", "grammar")
"""Fields of `SamplingParams` of which one may say what the output must be."""


class Law(Enum):
    """The rule by which a verifier accepts a tree's nodes."""

    REPLAY = 1
    MSS = 2


PROPOSALS = {
    Law.REPLAY: tuple(Proposal),
    Law.MSS: DRAWN,
}
"""What each law can serve; `replay` anything, `mss` real draws only. The first is the default."""


@dataclass(frozen=True, slots=True)
class SpeculationParams:
    """How a request is speculated on; values that cannot be served raise `InvalidRequest`.

    Attributes:
        growth: a growth policy such as "best-first" or "<1,1,3>"; empty is the speculator's own.
        max_nodes: most tree nodes per step; 0 decodes plainly, None is the verifier's choice.
    """

    law: Law = Law.REPLAY
    proposal: Proposal = Proposal.COUPLED
    growth: str = ""
    max_nodes: int | None = None

    def __post_init__(self) -> None:
        served = PROPOSALS[self.law]
        names = ", ".join(proposal.name.lower() for proposal in served)
        under = f"proposal under law {self.law.name.lower()}"
        _check(self.proposal in served, under, self.proposal.name.lower(), names)
        bound = f"at most {MAX_GROWTH_CHARACTERS}"
        fits = len(self.growth) <= MAX_GROWTH_CHARACTERS
        _check(fits, "number of characters in growth", len(self.growth), bound)

    @classmethod
    def of(
        cls,
        law: Law = Law.REPLAY,
        proposal: Proposal | None = None,
        growth: str = "",
        max_nodes: int | None = None,
    ) -> SpeculationParams:
        """The same with the law's own proposal where none is given."""
        return cls(law, proposal or PROPOSALS[law][0], growth, max_nodes)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are picked; values out of bounds raise `InvalidRequest` naming value and bound.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: nucleus mass in (0, 1].
        min_p: keep tokens of at least min_p times the likeliest one's probability.
        repetition_penalty: over prompt and output; 1 is none.
        presence_penalty: once per token seen in the output.
        frequency_penalty: per occurrence in the output.
        logit_bias: added to the logits of token ids.
        seed: same seed, same text; None lets the router draw one.
        max_tokens: most tokens to generate.
        stop: strings that end the output and are cut from it.
        stop_token_ids: tokens that end the output beside the model's own.
        ignore_eos: go on past the model's end-of-sequence token.
        json_schema, regex, grammar: what the output must be, one of them at most: a JSON schema (a
            mapping, or JSON text), a regular expression, or a grammar in llguidance's Lark.
        logprobs: report the chosen token's log-probability and this many likeliest; None: none.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    json_schema: str | Mapping[str, Any] = ""
    regex: str = ""
    grammar: str = ""

    def __post_init__(self) -> None:
        _check(not isinstance(self.stop, str), "stop", repr(self.stop), "a sequence of strings")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        check_counts(self.logit_bias, self.stop, self.stop_token_ids)
        self._check_finite()
        for name, (low, high) in _BOUNDS.items():
            _check(low <= getattr(self, name) <= high, name, getattr(self, name), f"{low}..{high}")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "(0, 1]")
        _check(0 <= self.top_k < 2**31, "top_k", self.top_k, "0 or more")
        _check(self.seed is None or 0 <= self.seed < 2**64, "seed", self.seed, "0..2**64-1")
        _check(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
        logprobs = range(MAX_LOGPROBS + 1)
        _check(self.logprobs in (None, *logprobs), "logprobs", self.logprobs, f"0..{MAX_LOGPROBS}")
        self._check_stops()
        if not isinstance(self.json_schema, str):
            object.__setattr__(self, "json_schema", json.dumps(self.json_schema))
        self._check_constraint()

    @property
    def constraint(self) -> tuple[str, str]:
        """Kind (a field's name) and text of what the output must be; both empty for none."""
        given = ((kind, str(getattr(self, kind))) for kind in CONSTRAINTS)
        return next(((kind, text) for kind, text in given if text), ("", ""))

    def _check_constraint(self) -> None:
        kinds = [kind for kind in CONSTRAINTS if getattr(self, kind)]
        _check(len(kinds) <= 1, "constraint", " and ".join(kinds), "one of them")
        kind, text = self.constraint
        bound = f"at most {MAX_CONSTRAINT_CHARACTERS}"
        fits = len(text) <= MAX_CONSTRAINT_CHARACTERS
        _check(fits, f"number of characters in {kind}", len(text), bound)
        _check(not (kind and self.ignore_eos), "ignore_eos", True, f"False beside {kind}")

    def _check_finite(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            _check(not isinstance(value, float) or math.isfinite(value), item.name, value, "finite")
        for token, bias in self.logit_bias.items():
            _check(abs(bias) <= _MAX_BIAS, f"logit_bias of token {token}", bias, "-1e9..1e9")

    def _check_stops(self) -> None:
        for text in self.stop:
            allowed = f"1..{_MAX_STOP_CHARACTERS} characters"
            short = 0 < len(text) <= _MAX_STOP_CHARACTERS
            _check(short, "length of a stop string", len(text), allowed)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have."""
        allowed = f"below the vocabulary size {vocab_size}"
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token in ids:
                _check(0 <= token < vocab_size, f"token id in {name}", token, allowed)


def _check(holds: bool, name: str, value: object, bound: str) -> None:
    if not holds:
        raise InvalidRequest(f"{name} is {value}; allowed: {bound}")


def check_counts(
    logit_bias: Collection[int], stop: Collection[str], stop_token_ids: Collection[int]
) -> None:
    """Raise InvalidRequest where a request has too many of them, whatever they are."""
    _check_count("logit_bias entries", logit_bias, _MAX_BIASES)
    _check_count("stop strings", stop, _MAX_STOPS)
    _check_count("stop_token_ids", stop_token_ids, _MAX_STOP_TOKENS)


def _check_count(name: str, items: Collection[object], limit: int) -> None:
    _check(len(items) <= limit, f"number of {name}", len(items), f"at most {limit}")
