"""What a proposer drew, and from what: all that multi-step speculative sampling may rely on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray


class Proposal(Enum):
    """How a draft chooses the children of a node."""

    COUPLED = 1
    TOPK = 2
    IID = 3
    WITHOUT_REPLACEMENT = 4


DRAWN = (Proposal.WITHOUT_REPLACEMENT, Proposal.IID)
"""Proposals that are draws from the distribution reported."""

MAX_DRAWS = 64
"""Draws below one node at most."""


@dataclass(frozen=True, slots=True)
class Draws:
    """Tokens drawn from one sparse distribution, in the order of drawing.

    Attributes:
        kind: one of `DRAWN`.
        ids: tokens of positive probability, no two the same.
        weights: float32 values in proportion to their probabilities; see `distribution`.
        drawn: token ids; repeats are kept.
    """

    kind: Proposal
    ids: tuple[int, ...]
    weights: tuple[float, ...]
    drawn: tuple[int, ...]

    @classmethod
    def certain(cls, token: int) -> Draws:
        """A guess made without chance: all the mass on one token."""
        return cls(Proposal.WITHOUT_REPLACEMENT, (token,), (1.0,), (token,))

    def first(self, count: int) -> Draws:
        """The first draws; the only part of a group that may stand for it."""
        return self if count >= len(self.drawn) else replace(self, drawn=self.drawn[:count])


def distribution(
    weights: tuple[float, ...],
) -> NDArray[np.float64]:  # [n]
    """Probabilities in proportion to float32 weights.

    Whoever draws and whoever verifies both call this: the law is exact only if the distribution
    reported is the very one that was drawn from.
    """
    masses = np.array(weights, np.float64)
    probs: NDArray[np.float64] = masses / masses.sum()
    return probs


def exclude(
    probs: NDArray[np.float64],  # [n]
    place: int,
) -> NDArray[np.float64]:
    """What is left to draw from without replacement once `place` was drawn."""
    left = probs.copy()
    left[place] = 0.0
    mass = float(left.sum())
    if mass > 0:
        left /= mass
    return left


@dataclass(frozen=True, slots=True)
class DrawGroup:
    """One proposer's draws below one node of a tree.

    Attributes:
        parent: the node, or `ROOT`.
        proposers: bit k is set for proposer k, as in a tree's nodes.
    """

    parent: int
    draws: Draws
    proposers: int = 1
