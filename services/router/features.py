"""A prompt as a short vector of hashed features: alike prompts lie close, and no text can be read.

Tokens and pairs of neighbouring tokens are counted in a few hundred buckets under a secret that
each process draws (the hashing trick), so a vector says what two prompts have in common and not
what they say.

Source: Weinberger et al. 2009, "Feature hashing for large scale multitask learning"
(arXiv 0902.2206).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from treecast.sampling.params import CONSTRAINTS, SamplingParams

Vector = NDArray[np.float32]

DIMENSIONS = 256
HEAD_TOKENS = 64
TAIL_TOKENS = 192
"""What is looked at of a long prompt: its instructions, and what is asked last."""

FACTS_WEIGHT = 0.3
"""What a vector's part on sampling and the prompt's length weighs, beside the text's 1."""

_WORD = 2**64


class Features:
    """Makes vectors that can be compared with those of the same object alone."""

    def __init__(self, secret: int | None = None) -> None:
        """`secret` is below 2**64, and drawn here unless given."""
        secret = secrets.randbits(64) if secret is None else secret
        odd = np.random.default_rng(secret).integers(0, _WORD, 3, np.uint64, endpoint=False) | 1
        self._first, self._second, self._fact = (np.uint64(factor) for factor in odd)

    def of(self, prompt: Sequence[int], sampling: SamplingParams) -> Vector:
        """[DIMENSIONS] float32 of length 1."""
        text = self._names(prompt)
        facts = np.array(_facts(prompt, sampling), np.uint64) * self._fact
        weights = np.ones(len(text) + len(facts), np.float32)
        weights[len(text) :] = FACTS_WEIGHT * math.sqrt(len(text) / len(facts))
        counts = self._count(np.concatenate((text, facts)), weights)
        return counts / np.float32(math.sqrt(counts @ counts) or 1.0)

    def _names(self, prompt: Sequence[int]) -> NDArray[np.uint64]:
        """Of the tokens and pairs that are looked at."""
        if len(prompt) > HEAD_TOKENS + TAIL_TOKENS:
            prompt = [*prompt[:HEAD_TOKENS], *prompt[-TAIL_TOKENS:]]
        tokens = (np.array(prompt, np.uint64) + np.uint64(1)) * self._first
        pairs = (tokens[:-1] ^ (tokens[:-1] >> np.uint64(29))) * self._second + tokens[1:]
        return np.concatenate((tokens, pairs))

    def _count(self, names: NDArray[np.uint64], weights: Vector) -> Vector:
        """Signed, so that what falls into one bucket by chance cancels out on average."""
        mixed = (names ^ (names >> np.uint64(32))) * self._second
        mixed ^= mixed >> np.uint64(32)
        buckets = (mixed % np.uint64(DIMENSIONS)).astype(np.intp)
        signs = np.where(mixed & np.uint64(1 << 20), -weights, weights)
        return np.bincount(buckets, signs, DIMENSIONS).astype(np.float32)


def _facts(prompt: Sequence[int], sampling: SamplingParams) -> list[int]:
    """What else tells lengths apart, a number for each, all different."""
    constrained = any(getattr(sampling, name) for name in CONSTRAINTS)
    facts = (
        len(prompt).bit_length(),
        sampling.max_tokens.bit_length(),
        len(sampling.stop) + len(sampling.stop_token_ids),
        int(sampling.ignore_eos),
        int(constrained),
        int(sampling.temperature > 0),
    )
    return [1 + kind + len(facts) * value for kind, value in enumerate(facts)]
