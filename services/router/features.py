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
LAST_TOKENS = 192
"""So much of a prompt's end is looked at."""

FADING_TOKENS = 48
"""A token so far from the end weighs 1/e of the last one: what is asked last tells most."""

FACTS_WEIGHT = 0.3
"""What a vector's part on sampling and the prompt's length weighs, beside the text's 1."""

_WORD = 2**64
_FADING = np.exp(-np.arange(LAST_TOKENS)[::-1] / FADING_TOKENS).astype(np.float32)


class Features:
    """Makes vectors that can be compared with those of the same object alone."""

    def __init__(self, secret: int | None = None) -> None:
        """`secret` is below 2**64, and drawn here unless given."""
        secret = secrets.randbits(64) if secret is None else secret
        odd = np.random.default_rng(secret).integers(0, _WORD, 3, np.uint64, endpoint=False) | 1
        self._first, self._second, self._fact = (np.uint64(factor) for factor in odd)

    def of(self, prompt: Sequence[int], sampling: SamplingParams) -> Vector:
        """[DIMENSIONS] float32 of length 1."""
        last = prompt[-LAST_TOKENS:]
        facts = np.array(_facts(prompt, sampling), np.uint64) * self._fact
        fading = _FADING[-len(last) :]
        text = np.concatenate((fading, fading[1:]))
        fact = FACTS_WEIGHT * math.sqrt(text @ text / len(facts))
        weights = np.concatenate((text, np.full(len(facts), fact, np.float32)))
        counts = self._count(np.concatenate((*self._names(last), facts)), weights)
        return counts / np.float32(math.sqrt(counts @ counts) or 1.0)

    def _names(self, tokens: Sequence[int]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Of the tokens, and of the pairs that each but the first is the second of."""
        names = (np.array(tokens, np.uint64) + np.uint64(1)) * self._first
        pairs = (names[:-1] ^ (names[:-1] >> np.uint64(29))) * self._second + names[1:]
        return names, pairs

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
