"""How long an output will be: a guess made before it begins, from what alike prompts led to.

The guess goes to verifiers with the request and may order the queue; it never changes a token.

Source: Zhao and Wang 2024, "ALISE: Accelerating Large Language Model Serving with Speculative
Scheduling" (arXiv 2410.23537), section 3: retrieval over past prompts, and a fallback where none
is alike. Theirs are embedded by a BERT and kept in a vector database; ours are hashed
(`features.py`), so that a router needs no model, and each tenant's and model's are its own.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, Protocol

import numpy as np

from treecast.sampling.params import SamplingParams
from treecast.sampling.stops import FinishReason

from .features import DIMENSIONS, Features, Vector

Whose = tuple[str, str, str]
"""Tenant, model, and adapter or none: lengths of others say nothing, and are nobody's business."""

REMEMBERED = 512
"""Prompts kept of one tenant and model, the newest."""

MAX_MEMORIES = 64
"""Tenants and models that are remembered, those heard of last; 32 MiB of vectors at most."""

NEIGHBOURS = 8
ALIKE = 0.2
"""Cosine, less what all prompts have in common, from which a past prompt counts as alike."""

_SHARPNESS = 8.0
"""A neighbour that is .1 further weighs exp(-.8) of one."""

OWN_ENDS = frozenset((FinishReason.STOP_TOKEN, FinishReason.STOP_STRING, FinishReason.LENGTH))
"""Ends that an output came to by itself: a length to learn from."""


class Source(Enum):
    """What a guess came from; the values are metric labels."""

    ALIKE = "alike"
    TYPICAL = "typical"
    LIMIT = "limit"


@dataclass(frozen=True, slots=True)
class Expected:
    """A guess.

    Attributes:
        tokens: of the whole output, at most `limit`.
        limit: the request's `max_tokens`.
        features: of the prompt, to learn from once it has ended; None where nothing is learned.
    """

    tokens: int
    limit: int
    source: Source
    features: Vector | None = None

    def after(self, num_committed: int) -> int:
        """The guess once so many tokens have come: as long again if they are more than that.

        What has outlived its guess says only that the guess was wrong; twice as long is right
        within a factor of two, as in multi-level feedback queues.
        """
        if num_committed < self.tokens:
            return self.tokens
        return max(num_committed, min(self.limit, 2 * num_committed))

    def left(self, num_committed: int) -> int:
        """Tokens still expected then."""
        return self.after(num_committed) - num_committed

    def doublings(self, num_tokens: int) -> float:
        """How far off it was: the size of log2(actual / guess)."""
        return abs(math.log2(max(1, num_tokens) / self.tokens))


class LengthPredictor(Protocol):
    """Event loop only."""

    def expect(
        self, whose: Whose, prompt: Sequence[int], sampling: SamplingParams
    ) -> Expected | None:
        """Guess; None for no idea. Changes nothing."""

    def learn(
        self, whose: Whose, expected: Expected | None, num_tokens: int, finish: FinishReason
    ) -> None:
        """Take in how long an output was that was guessed."""


class NoPredictor:
    """Has no idea."""

    def expect(self, whose: Whose, prompt: Sequence[int], sampling: SamplingParams) -> None:
        return None

    def learn(
        self, whose: Whose, expected: Expected | None, num_tokens: int, finish: FinishReason
    ) -> None:
        pass


class LimitPredictor:
    """Says `max_tokens`: the truth where clients know their lengths, and nowhere else."""

    def expect(self, whose: Whose, prompt: Sequence[int], sampling: SamplingParams) -> Expected:
        return Expected(sampling.max_tokens, sampling.max_tokens, Source.LIMIT)

    def learn(
        self, whose: Whose, expected: Expected | None, num_tokens: int, finish: FinishReason
    ) -> None:
        pass


class Memory:
    """One tenant's newest prompts of one model, as vectors, and their outputs' lengths."""

    def __init__(self) -> None:
        self._vectors = np.zeros((REMEMBERED, DIMENSIONS), np.float32)
        self._logs = np.zeros(REMEMBERED, np.float32)
        self._sum = np.zeros(DIMENSIONS, np.float64)
        self._added = 0

    def __len__(self) -> int:
        return min(self._added, REMEMBERED)

    def add(self, features: Vector, num_tokens: int) -> None:
        at = self._added % REMEMBERED
        self._sum += features - self._vectors[at]
        self._vectors[at] = features
        self._logs[at] = math.log(max(1, num_tokens))
        self._added += 1

    @property
    def typical(self) -> float:
        """The median length."""
        return math.exp(float(np.median(self._logs[: len(self)])))

    def of_alike(self, features: Vector) -> float | None:
        """The weighted geometric mean of the nearest prompts' lengths; None if none is near.

        Similarity is the cosine with the mean of all prompts taken away: what a chat template or a
        system prompt adds to each of them makes none alike.
        Source of that: Mu and Viswanath 2018, "All-but-the-top" (arXiv 1702.01417).
        """
        similar = self._similarities(features)
        count = min(NEIGHBOURS, len(self))
        nearest = np.argpartition(similar, -count)[-count:]
        nearest = nearest[similar[nearest] >= ALIKE]
        if not len(nearest):
            return None
        weights = np.exp(_SHARPNESS * similar[nearest])
        return math.exp(float(weights @ self._logs[nearest] / weights.sum()))

    def _similarities(self, features: Vector) -> Vector:
        """[len] float32. All vectors have length 1, so that products are all it takes."""
        vectors = self._vectors[: len(self)]
        mean = (self._sum / len(self)).astype(np.float32)
        common, ours, size = vectors @ mean, features @ mean, mean @ mean
        overlaps = vectors @ features - common - ours + size
        sizes = (1 - 2 * common + size) * (1 - 2 * ours + size)
        similar: Vector = overlaps / np.sqrt(np.maximum(sizes, 1e-9))
        return similar


class HistoryPredictor:
    """Learns each tenant's and model's lengths from what has ended; bounded, forgets the oldest."""

    def __init__(self, secret: int | None = None) -> None:
        """`secret` of the features; drawn unless given."""
        self._features = Features(secret)
        self._memories: OrderedDict[Whose, Memory] = OrderedDict()

    def expect(self, whose: Whose, prompt: Sequence[int], sampling: SamplingParams) -> Expected:
        features, limit = self._features.of(prompt, sampling), sampling.max_tokens
        memory = self._memories.get(whose)
        if memory is None:
            return Expected(limit, limit, Source.LIMIT, features)
        alike = memory.of_alike(features)
        source = Source.TYPICAL if alike is None else Source.ALIKE
        tokens = memory.typical if alike is None else alike
        return Expected(max(1, min(limit, round(tokens))), limit, source, features)

    def learn(
        self, whose: Whose, expected: Expected | None, num_tokens: int, finish: FinishReason
    ) -> None:
        """Outputs that a deadline or a client cut say nothing; those cut by `max_tokens` count as
        that long, which is one of the facts that the features tell.
        """
        if expected is None or expected.features is None or finish not in OWN_ENDS:
            return
        memory = self._memories.get(whose)
        if memory is None:
            memory = self._memories[whose] = Memory()
        self._memories.move_to_end(whose)
        memory.add(expected.features, num_tokens)
        while len(self._memories) > MAX_MEMORIES:
            self._memories.popitem(last=False)


Predictor = Literal["history", "none", "max-tokens"]


def predictor_of(name: Predictor) -> LengthPredictor:
    """By the name that the settings give it."""
    match name:
        case "history":
            return HistoryPredictor()
        case "max-tokens":
            return LimitPredictor()
    return NoPredictor()
