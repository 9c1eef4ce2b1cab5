"""So many at each turn of the event loop, so that what else is due comes in between."""

from __future__ import annotations

import asyncio
from collections import deque

PER_TURN = 4
"""A request's way from one wait to the next takes up to a millisecond of the loop's time."""


class Turnstile:
    """Requests that all come, or all lose their verifier, in one moment go on a few at a time.

    The event loop runs all that is ready before it looks at what has arrived since: thousands of
    requests that are ready at once would hold up health checks, heartbeats and running streams.
    First come, first through. Event loop only.
    """

    def __init__(self, per_turn: int = PER_TURN) -> None:
        self._per_turn = self._left = per_turn
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        """Wait for one's turn, if too many have gone through in this one."""
        if self._left:
            self._take()
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    def _take(self) -> None:
        if self._left == self._per_turn:
            asyncio.get_running_loop().call_soon(self._next_turn)
        self._left -= 1

    def _next_turn(self) -> None:
        self._left = self._per_turn
        while self._waiting and self._left:
            turn = self._waiting.popleft()
            if not turn.done():  # cancelled
                turn.set_result(None)
                self._take()
