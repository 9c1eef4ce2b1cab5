"""When a broken stream is worth another attempt, and how long to wait before it."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from treecast.errors import (
    DeadlineExceeded,
    DuplicateRequest,
    Overloaded,
    TreecastError,
    Unavailable,
)

from .transcript import Transcript


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a client goes on when its router is lost.

    Attributes:
        attempts_to_start: tries before the first response.
        attempts: tries in a row that may bring nothing new, once a stream had begun.
        first_backoff_s: wait after the first failure; it doubles with each further one.
        max_backoff_s: the longest wait.
    """

    attempts_to_start: int = 3
    attempts: int = 8
    first_backoff_s: float = 0.1
    max_backoff_s: float = 2.0


class Attempts:
    """Counts one request's failures in a row, and keeps its deadline over all of them."""

    def __init__(self, policy: RetryPolicy, timeout_s: float | None) -> None:
        self._policy = policy
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._failures = 0
        self._progress = 0
        self.total_failures = 0

    def remaining_s(self) -> float | None:
        """Seconds that the request still has.

        Raises:
            DeadlineExceeded: none are left.
        """
        if self._deadline is None:
            return None
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("the request's deadline passed between two attempts")
        return left

    def failed(self, error: TreecastError, transcript: Transcript) -> float:
        """Count a failure; tokens received since the last one start a new count.

        Returns:
            Seconds to wait before the next attempt, at random from half the backoff to all of it;
            beyond the time that a crowded router asked for.
        Raises:
            TreecastError: `error` itself, when another attempt cannot help or all are spent.
            DeadlineExceeded: there is no time for another attempt.
        """
        # A router that lives on may hold the broken stream's request for a moment longer.
        released = isinstance(error, DuplicateRequest) and self.total_failures > 0
        # One that others crowd to has room or quota again soon: what had begun is not given up.
        crowded = isinstance(error, Overloaded) and transcript.begun
        if not (released or crowded or isinstance(error, Unavailable)):
            raise error
        if transcript.num_tokens > self._progress:
            self._failures = 0
        self._failures, self._progress = self._failures + 1, transcript.num_tokens
        policy = self._policy
        allowed = policy.attempts if transcript.begun else policy.attempts_to_start
        if self._failures >= allowed:
            raise error
        self.total_failures += 1
        backoff_s = policy.first_backoff_s * 2.0 ** (self._failures - 1)
        wait_s = min(backoff_s, policy.max_backoff_s) * random.uniform(0.5, 1.0)
        if isinstance(error, Overloaded):
            wait_s += error.retry_after_s
        if self._deadline is not None and time.monotonic() + wait_s >= self._deadline:
            raise DeadlineExceeded(
                f"the request's deadline comes before its next attempt, in {wait_s:.1f} s; "
                f"the last one failed: {error}"
            ) from error
        return wait_s
