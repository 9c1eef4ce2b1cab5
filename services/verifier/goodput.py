"""What a second is worth to the requests of a batch, and whether waiting for trees pays."""

from __future__ import annotations

_MEMORY = 0.95
_PRIOR_STEPS = 4.0
"""Steps that the first estimate counts for."""

PROBE_STEPS = 8
"""Steps between waits that are made only so that their worth stays known."""
RARE_PROBE_STEPS = 64
"""The same where trees lately came after any wait."""


class Goodput:
    """Tokens per second that one request gets, as a mean over the last twenty steps or so.

    It is the price of time: to commit the most tokens per second, do what adds at least so many
    for each second that it takes (Dinkelbach's rule for ratios), be it a row, a wait or a draft
    model's pass.
    """

    def __init__(self, tokens_per_s: float) -> None:
        """Begin with an estimate."""
        self._tokens = _PRIOR_STEPS
        self._request_s = _PRIOR_STEPS / tokens_per_s

    @property
    def tokens_per_s(self) -> float:
        """Of one request."""
        return self._tokens / self._request_s

    def saw(self, num_tokens: int, num_requests: int, seconds: float) -> None:
        """A step committed tokens of so many requests, `seconds` after the one before."""
        self._tokens = _MEMORY * self._tokens + num_tokens
        self._request_s = _MEMORY * self._request_s + num_requests * seconds


def worth_waiting(
    gain_tokens: float, rate_tokens_per_s: float, expected_s: float, patience_s: float
) -> bool:
    """Whether to wait on for trees that are missing.

    Args:
        gain_tokens: accepted tokens expected from them in the next step.
        rate_tokens_per_s: tokens that the batch commits per second lately.
        expected_s: time until they come, going by how long they took lately; negative if overdue.
        patience_s: time after which the wait ends anyway.
    """
    if expected_s > patience_s:
        return False  # they would be waited for in vain
    return gain_tokens > rate_tokens_per_s * min(abs(expected_s), patience_s)
