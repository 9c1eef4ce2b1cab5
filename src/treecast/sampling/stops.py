"""When an output ends: end-of-sequence and stop tokens, stop strings, length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from treecast.sampling.params import SamplingParams

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_MAX_WAITING = 16


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
        decode: Callable[[Sequence[int]], str] | None = None,
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
        self._text = StopText(sampling.stop, decode) if decode and sampling.stop else None

    def check(self, token: int) -> Stop | None:
        """Take in the next output token; tells whether the output ends with it."""
        self._num_tokens += 1
        characters = self._text.push(token) if self._text else None
        if token in self._stop_ids:
            return Stop(FinishReason.STOP_TOKEN)
        if characters is not None:
            return Stop(FinishReason.STOP_STRING, characters)
        if self._num_tokens >= self._max_tokens:
            return Stop(FinishReason.LENGTH)
        return None


class StopText:
    """Finds stop strings in a growing text.

    Tokens are decoded behind a few settled ones, as a tokenizer may spell a token by what precedes
    it; a token that ends within a character waits for those that complete it.
    """

    def __init__(self, stops: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        self._stops = stops
        self._decode = decode
        self._keep = max(len(stop) for stop in stops) - 1
        self._settled: list[int] = []
        self._waiting: list[int] = []
        self._tail = ""

    def push(self, token: int) -> int | None:
        """Characters from the first stop string to the end of the text, if one is in it now."""
        self._waiting.append(token)
        before = self._decode(self._settled)
        after = self._decode(self._settled + self._waiting)
        if after.endswith(_UNFINISHED) and len(self._waiting) < _MAX_WAITING:
            return None
        if len(after) > len(before):
            self._settled = self._waiting
        self._waiting = []
        return self._search(after[len(before) :])

    def _search(self, new: str) -> int | None:
        text = self._tail + new
        self._tail = text[len(text) - self._keep :] if self._keep < len(text) else text
        found = (text.find(stop) for stop in self._stops)
        return max((len(text) - at for at in found if at >= 0), default=None)
