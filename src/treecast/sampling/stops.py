"""When an output ends: end-of-sequence and stop tokens, stop strings, length."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from treecast.sampling.params import SamplingParams
from treecast.text.detok import Decode, DetokStream


class FinishReason(Enum):
    """Why an output ended."""

    STOP_TOKEN = 1
    STOP_STRING = 2
    LENGTH = 3
    DEADLINE = 4
    CANCELLED = 5


@dataclass(frozen=True, slots=True)
class Stop:
    """The end of an output.

    Attributes:
        characters: how many at the end of its text belong to the stop string, or lie behind it in
            the last token; to be cut.
    """

    reason: FinishReason
    characters: int = 0


class StopRules:
    """One request's stops. It sees each output token once, in order."""

    def __init__(
        self,
        eos_token_ids: Iterable[int],
        sampling: SamplingParams,
        decode: Decode | None = None,
    ) -> None:
        """Begin an output; one that is taken up again needs its tokens checked anew.

        Args:
            eos_token_ids: the model's own; they end the output unless the request ignores them.
            sampling: the request's stops and `max_tokens`.
            decode: text of some output tokens; None for a model without a tokenizer, where stop
                strings have no effect.
        """
        eos = () if sampling.ignore_eos else eos_token_ids
        self._stop_ids = frozenset(eos).union(sampling.stop_token_ids)
        self._max_tokens = sampling.max_tokens
        self._num_tokens = 0
        self._text = DetokStream(decode, sampling.stop) if decode and sampling.stop else None

    def check(self, token: int) -> Stop | None:
        """Take in the next output token; tells whether the output ends with it."""
        self._num_tokens += 1
        characters = self._search(token)
        if token in self._stop_ids:
            return Stop(FinishReason.STOP_TOKEN)
        if characters is not None:
            return Stop(FinishReason.STOP_STRING, characters)
        if self._num_tokens >= self._max_tokens:
            return Stop(FinishReason.LENGTH)
        return None

    def _search(self, token: int) -> int | None:
        if self._text is None:
            return None
        self._text.push([token])
        return self._text.stop_characters
