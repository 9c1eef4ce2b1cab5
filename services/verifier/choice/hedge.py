"""How much each voter is believed: weights that shrink with every mistake."""

from __future__ import annotations

import math
from collections.abc import Mapping

_RATE = 0.2
_SHARE = 0.01


class Hedge:
    """Multiplicative weights over voters that may abstain.

    A mistake multiplies a weight by `exp(-rate)`; then those who voted are scaled so that their sum
    stays as it was. Whoever abstained neither gains nor loses, and the mean weight stays 1. A small
    share of the weight is spread evenly, so that a voter that was bad for long can come back.

    Source: Hedge with sleeping experts (Freund et al. 1997), fixed share (Herbster and Warmuth
    1998); Minions (arXiv 2402.15678) learns its majority's weights so.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})

    @property
    def weights(self) -> Mapping[str, float]:
        return self._weights

    def weight(self, voter: str) -> float:
        """1 for a voter not seen yet."""
        return self._weights.get(voter, 1.0)

    def saw(self, verdicts: Mapping[str, bool]) -> None:
        """Learn who of those that voted at one position was right."""
        before = {voter: self.weight(voter) for voter in verdicts}
        after = {
            voter: before[voter] * (1.0 if right else math.exp(-_RATE))
            for voter, right in verdicts.items()
        }
        scale = sum(before.values()) / sum(after.values())
        even = sum(before.values()) / len(before)
        for voter, weight in after.items():
            self._weights[voter] = (1 - _SHARE) * scale * weight + _SHARE * even

    def forget(self, voter: str) -> None:
        """Drop a voter that is gone."""
        self._weights.pop(voter, None)

    def copy(self) -> Hedge:
        """Same weights, learning on their own."""
        return Hedge(self._weights)
