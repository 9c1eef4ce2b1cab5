"""A circuit breaker: who failed lately is left alone for a while, then tried by one caller."""

from __future__ import annotations

import time
from collections.abc import Callable


class Breaker:
    """Closed, until `threshold` failures in a row open it for `pause_s` seconds.

    After the pause it takes one trial: its success closes the breaker, its failure opens it anew.
    A trial of which nothing is heard for another pause is given up for the next one. Not
    thread-safe.
    Source: Nygard 2007, "Release It!", circuit breaker.
    """

    def __init__(
        self, threshold: int, pause_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._threshold = threshold
        self._pause_s = pause_s
        self._clock = clock
        self._failures = 0
        self._closed_to_s = 0.0

    @property
    def tripped(self) -> bool:
        """Whether it failed so often, and has not succeeded since."""
        return self._failures >= self._threshold

    @property
    def allows(self) -> bool:
        """Whether a caller may try now."""
        return not self.tripped or self._clock() >= self._closed_to_s

    def trying(self) -> None:
        """A caller tries; while the breaker is tripped, no other may until it knows."""
        if self.tripped:
            self._closed_to_s = self._clock() + self._pause_s

    def failed(self) -> None:
        self._failures += 1
        self._closed_to_s = self._clock() + self._pause_s

    def succeeded(self) -> None:
        self._failures = 0
