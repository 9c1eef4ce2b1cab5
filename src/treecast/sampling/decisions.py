"""Where chance comes in: two questions, answered by counted uniforms that keep no generator state.

Each position of each text has its own counters, so no two decisions share a uniform. Drafting has
another domain, and another key, than verification: a verifier's answers are independent of what
was drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treecast.sampling.noise import philox4x32

_BLOCK = 32


class Domain(IntEnum):
    """Third word of the counter; that of the Gumbel noise is 0."""

    VERIFY = 1
    DRAFT = 2


class Decisions(Protocol):
    """The chances of one node. A test may answer each question in every possible way."""

    def accepts(self, probability: float) -> bool:
        """True with this probability; what is above 1 counts as 1."""

    def choose(self, weights: NDArray[np.float64]) -> int:
        """An index in proportion to the weights; they need not sum to 1."""


@dataclass(slots=True)
class Uniforms:
    """Decisions that are a pure function of key, place and their number.

        counter = (position, branch, domain, block), key as of `noise_key`
        u = (first word * 2**21 + second word >> 11) / 2**53

    Attributes:
        position: absolute position of the token to be decided on, below 2**32.
        branch: tells nodes of one position apart, below 2**32.
    """

    key: int
    position: int
    domain: Domain = Domain.VERIFY
    branch: int = 0
    _num_blocks: int = 0
    _ready: list[float] = field(default_factory=list)

    def accepts(self, probability: float) -> bool:
        return self._next() < probability

    def choose(self, weights: NDArray[np.float64]) -> int:
        cumulative = np.cumsum(weights)
        target = self._next() * cumulative[-1]
        # Rounded up to the total, the target would lie behind the last weight that is not 0.
        last = int(np.searchsorted(cumulative, cumulative[-1], side="left"))
        return min(int(np.searchsorted(cumulative, target, side="right")), last)

    def _next(self) -> float:
        if not self._ready:
            self._ready = self._block()[::-1]
        return self._ready.pop()

    def _block(self) -> list[float]:
        words = [self.position, self.branch, int(self.domain)]
        serial = np.arange(_BLOCK) + _BLOCK * self._num_blocks
        self._num_blocks += 1
        zero = np.zeros(_BLOCK, np.int64)
        counter = (zero + words[0], zero + words[1], zero + words[2], serial)
        high, low, _, _ = philox4x32(counter, self.key)
        bits: list[int] = ((high << 21) + (low >> 11)).tolist()
        return [word * 2.0**-53 for word in bits]
