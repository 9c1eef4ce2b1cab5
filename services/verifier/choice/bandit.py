"""Which speculator yields most tokens per second: a bandit that goes on looking, within bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

_MEMORY = 0.9995
_SPREAD = 0.35
_OTHERS_ROUNDS = 16.0


@dataclass(slots=True)
class Arm:
    """What a speculator's rounds gave, forgetting slowly."""

    rounds: float = 0.0
    tokens: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def fade(self) -> None:
        self.rounds *= _MEMORY
        self.tokens *= _MEMORY
        self.seconds *= _MEMORY


class RateBandit:
    """Discounted UCB on tokens per second, taken as a ratio of sums so that slow rounds count.

    An arm's estimate leans on one imagined round at the best rate known. So an arm never tried is
    worth trying, and one not tried for long is again, as its evidence fades. **Exploration is
    bounded**: the bonus for being little known is `best * min(1, spread * sqrt(2 ln(1 + N) /
    (1 + n)))`, n of N rounds being this arm's; it never more than doubles the best rate. With
    rounds forgotten over some 2000, an arm that was found bad is still tried now and then.

    A request's bandit has the verifier's as its parent: others' record of an arm counts as 16
    rounds of the request's own at most.

    Source: Garivier and Moulines (arXiv 0805.3415), discounted UCB; SPIN (arXiv 2503.15921).
    """

    def __init__(self, parent: RateBandit | None = None) -> None:
        self._parent = parent
        self._arms: dict[str, Arm] = {}

    def saw(self, arm: str, tokens: int, seconds: float) -> None:
        """Take in one round of an arm, here and in the parent."""
        for known in self._arms.values():
            known.fade()
        record = self._arms.setdefault(arm, Arm())
        record.rounds += 1
        record.tokens += tokens
        record.seconds += max(1e-6, seconds)
        if self._parent is not None:
            self._parent.saw(arm, tokens, seconds)

    def forget(self, arm: str) -> None:
        """Drop an arm that is gone."""
        self._arms.pop(arm, None)

    def index(self, arm: str) -> float:
        """Optimistic tokens per second; equal for all, and above 0, while nothing is known."""
        best = self._best_rate() or 1.0
        record = self._record(arm)
        estimate = (record.rounds * record.rate + best) / (record.rounds + 1)
        return estimate + best * self._width(record.rounds)

    def _width(self, rounds: float) -> float:
        total = sum(self._record(name).rounds for name in self._known())
        return min(1.0, _SPREAD * math.sqrt(2 * math.log1p(total) / (1 + rounds)))

    def _record(self, arm: str) -> Arm:
        """Its own rounds and a bounded number of the parent's."""
        own = self._arms.get(arm, Arm())
        others = self._parent._arms.get(arm) if self._parent is not None else None
        if others is None:
            return own
        share = min(1.0, _OTHERS_ROUNDS / max(others.rounds, 1e-9))
        return Arm(
            own.rounds + share * others.rounds,
            own.tokens + share * others.tokens,
            own.seconds + share * others.seconds,
        )

    def _known(self) -> set[str]:
        return self._arms.keys() | (self._parent._arms.keys() if self._parent else set())

    def _best_rate(self) -> float:
        return max((self._record(name).rate for name in self._known()), default=0.0)
