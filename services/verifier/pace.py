"""What a speculator's trees bring and take, and what a commit asks of it for that."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

_TRIED_EVERY = 4
"""Of requests that begin while it does not pay, one in so many has their text read at once."""
_DECAY = 0.5 ** (1 / 16)
"""What a mean keeps in a step: half of it in sixteen."""
DECAY_OF_ONE = 0.5 ** (1 / 8)
"""The same of one request's: texts differ more than what a speculator is worth over all of them."""


class Turn(Enum):
    """What one commit asks of a speculator."""

    DRAFT = "a tree"
    CATCH_UP = "a tree after text that it has yet to read, so its time says nothing"
    SIT_OUT = "nothing"


@dataclass(slots=True)
class Gain:
    """Accepted nodes per step that a speculator proposed, as running means.

    Less what verifying its nodes takes, in tokens.

    Attributes:
        alone: as far as they follow one another.
        added: those that would not have been reached without it.
    """

    alone: float
    added: float

    def saw(self, alone: float, added: float, decay: float = _DECAY) -> None:
        self.alone += (1 - decay) * (alone - self.alone)
        self.added += (1 - decay) * (added - self.added)

    def of(self, *, first: bool) -> float:
        """What there is of it where nobody is quicker whose trees hold the same tokens, or else."""
        return self.alone if first else self.added


@dataclass(slots=True)
class Pace:
    """What waiting for a speculator costs and gains.

    It begins hopeful, so that the first waits show the truth.

    Attributes:
        latency_s: from commit to tree, of trees that were waited for, as a running mean.
        gain: over all requests.
        num_begun: requests that began while it did not pay.
    """

    latency_s: float = 0.0
    gain: Gain = field(default_factory=lambda: Gain(alone=2.0, added=1.0))
    num_begun: int = 0

    def first_turn(self, pays: bool) -> Turn:
        """What a request's whole text asks for: reading it takes time too; changes the count."""
        if pays:
            return Turn.CATCH_UP
        self.num_begun += 1
        return Turn.CATCH_UP if self.num_begun % _TRIED_EVERY == 1 else Turn.SIT_OUT

    def price(self, tokens_per_s: float) -> float:
        """Tokens that would be committed while it makes a tree."""
        return tokens_per_s * self.latency_s

    def saw_latency(self, latency_s: float) -> None:
        self.latency_s += (1 - _DECAY) * (latency_s - self.latency_s)
