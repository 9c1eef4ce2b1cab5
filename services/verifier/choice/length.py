"""How long a chain to verify: time of a step over the tokens expected of it, at its least."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

_MEMORY = 0.995
_PRIOR_ACCEPTANCE = 0.7
_PRIOR_TRIALS = 0.1
_MARGIN = 0.03


class AcceptanceTrend:
    """Acceptance of a chain's token, its predecessors accepted, as a line over the depth.

    A line, since deep positions are seldom reached: they follow the trend of those that are.
    Weighted least squares, the weight being the (slowly forgotten) number of times that a depth
    was reached; a tenth of a trial at each depth keeps the line defined.
    """

    def __init__(self, max_length: int) -> None:
        self._trials = np.zeros(max_length)
        self._hits = np.zeros(max_length)

    def saw(self, chain: Sequence[int], tokens: Sequence[int]) -> None:
        """Compare a chain, uncut, with what the target picked as far as that is known."""
        self._trials *= _MEMORY
        self._hits *= _MEMORY
        for depth, (guess, picked) in enumerate(zip(chain, tokens, strict=False)):
            if depth >= len(self._trials):
                return
            self._trials[depth] += 1
            self._hits[depth] += guess == picked
            if guess != picked:
                return

    def expected_tokens(self) -> list[float]:
        """Element n: tokens that a step with a chain of n yields, its last pick included."""
        survival = np.cumprod(self._fitted())
        return [1.0, *(1.0 + np.cumsum(survival)).tolist()]

    def _fitted(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        depths = np.arange(len(self._trials), dtype=np.float64)
        weights = self._trials + _PRIOR_TRIALS
        shares = (self._hits + _PRIOR_TRIALS * _PRIOR_ACCEPTANCE) / weights
        depth, share = np.average(depths, weights=weights), np.average(shares, weights=weights)
        spread = np.average((depths - depth) ** 2, weights=weights)
        slope = np.average((depths - depth) * (shares - share), weights=weights) / max(spread, 1e-9)
        line: np.ndarray[tuple[int], np.dtype[np.float64]] = share + slope * (depths - depth)
        return np.clip(line, 0.01, 0.99)


class AdaptiveLength:
    """The length in use. It changes only for one that is better by a margin, so it does not flap.

    Never 0: whether a step should have nodes at all is the planner's to say.

    Source: Minions (arXiv 2402.15678), adaptive speculation length; hysteresis by margin.
    """

    def __init__(self, max_length: int, margin: float = _MARGIN) -> None:
        self._max_length = max_length
        self._margin = margin
        self.value = min(4, max_length)

    def update(self, step_s: Callable[[int], float], expected_tokens: Sequence[float]) -> int:
        """Go to the best length if it is better enough, and return the length in use.

        Args:
            step_s: seconds of a step, drafting included, by chain length.
            expected_tokens: [max_length + 1], tokens of a step by chain length.
        """
        lengths = range(1, self._max_length + 1)
        cost = {length: step_s(length) / expected_tokens[length] for length in lengths}
        best = min(lengths, key=cost.__getitem__)
        if cost[best] < (1 - self._margin) * cost[self.value]:
            self.value = best
        return self.value
