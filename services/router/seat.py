"""One sample's place on a verifier's stream, from placement to its last frame."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from treecast.errors import TreecastError
from treecast.wire.frames import (
    Cancel,
    Completed,
    Failed,
    Hello,
    Progress,
    RouterFrame,
    ServingFrame,
    Start,
)
from treecast.wire.link import Link

VerifierLink = Link[RouterFrame, ServingFrame]


@dataclass(frozen=True, slots=True)
class Lost:
    """The stream closed before the request had ended."""

    why: str


SeatEnd = Completed | Failed | Lost


class Seat:
    """Collects a request's frames until they are taken, so that a slow client gets fewer, longer
    ones. Bounded by `max_tokens`.
    """

    def __init__(
        self,
        handle: int,
        stream: int,
        link: VerifierLink,
        vacate: Callable[[], None],
        ended: Callable[[SeatEnd], None] = lambda end: None,
    ) -> None:
        """`ended` is told how the verifier ended the request, unless it was left before."""
        self.handle = handle
        self.stream = stream
        self._link = link
        self._vacate = vacate
        self._tell_end = ended
        self._frames: list[Progress | SeatEnd] = []
        self._arrived = asyncio.Event()
        self._started = False
        self._ended = False

    @property
    def verifier(self) -> Hello:
        return self._link.peer

    def start(self, start: Start) -> None:
        """Send the request. Once."""
        self._started = True
        self._link.send(start)

    async def take(self) -> list[Progress | SeatEnd]:
        """Wait for frames and drain them; nothing follows a `SeatEnd`."""
        await self._arrived.wait()
        self._arrived.clear()
        frames, self._frames = self._frames, []
        return frames

    def leave(self) -> None:
        """Free the place; what still runs there is cancelled at once. Safe to repeat."""
        if self._started and not self._ended:
            self._link.send(Cancel(self.handle))
        self._ended = True
        self._vacate()

    def put(self, frame: Progress | SeatEnd) -> None:
        if self._ended:
            return
        self._frames.append(frame)
        self._arrived.set()
        if not isinstance(frame, Progress):
            self._ended = True
            self._tell_end(frame)
            self._vacate()

    def fail(self, error: TreecastError) -> None:
        """End the request for what was wrong with one of its frames."""
        if not self._ended:
            self._link.send(Cancel(self.handle))
            self.put(Failed(self.handle, error))
