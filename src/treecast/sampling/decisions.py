"""Where chance comes in: two questions, answered by counted uniforms that keep no generator state.

Each position of each text has its own counters, so no two decisions share a uniform. Drafting has
another domain, and another key, than verification: a verifier's answers are independent of what
was drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treecast.sampling.noise import philox_of


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

        counter = (position, branch, domain, number), key as of `noise_key`
        u = (first word * 2**21 + second word >> 11) / 2**53

    Attributes:
        position: absolute position of the token to be decided on, below 2**32.
        branch: tells nodes of one position apart, below 2**32.
    """

    key: int
    position: int
    domain: Domain = Domain.VERIFY
    branch: int = 0
    _num_taken: int = 0

    def accepts(self, probability: float) -> bool:
        return self._next() < probability

    def choose(self, weights: NDArray[np.float64]) -> int:
        cumulative = weights.cumsum()
        total = cumulative[-1]
        chosen = int(cumulative.searchsorted(self._next() * total, side="right"))
        if chosen == len(cumulative):  # rounded up to the total, behind the last that is not 0
            chosen = int(cumulative.searchsorted(total, side="left"))
        return chosen

    def _next(self) -> float:
        counter = (self.position, self.branch, int(self.domain), self._num_taken)
        self._num_taken += 1
        high, low, _, _ = philox_of(counter, self.key)
        return float((high << 21) + (low >> 11)) * 2.0**-53
