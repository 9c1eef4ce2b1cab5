"""One open stream between two peers; both ends of both hops run this code."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, Protocol, TypeVar

import grpc
import structlog

from treecast.errors import InvalidFrame, TreecastError, Unavailable
from treecast.tree import MAX_PROPOSERS
from treecast.wire.codec import Limits
from treecast.wire.frames import BadFrame, Heartbeat, Hello, Role
from treecast.wire.greeting import Greeting, check_alive
from treecast.wire.hop import End
from treecast.wire.outbox import Outbox, slot_key
from treecast.wire.packing import pack
from treecast.wire.status import from_rpc_error

HEARTBEAT_S = 0.25
SILENCE_S = 1.0
"""A peer that sends nothing for so long is dead, whatever TCP says."""

FRAMES_PER_TURN = 4
"""Frames of one message that are delivered in a row. Each wakes somebody, and a verifier's step may
have one for each of hundreds of requests: what else the event loop has to do waits no longer.
"""

Out = TypeVar("Out")
In = TypeVar("In")
HandlerOut = TypeVar("HandlerOut")
HandlerIn = TypeVar("HandlerIn", contravariant=True)

log = structlog.get_logger()


class PairHandler(Protocol[HandlerOut, HandlerIn]):
    """What a service does with its streams. Called on the event loop; must not block.

    What `received` raises comes back through `failed_frame` (as "internal error", and logged, if
    it is no `TreecastError`), so that a bad frame costs its own session alone.
    """

    def opened(self, link: Link[HandlerOut, Any]) -> None:
        """The hellos agree; `link.peer` is the peer's."""

    def received(self, link: Link[HandlerOut, Any], frame: HandlerIn) -> None:
        """A well-formed frame came; its handle may be unknown."""

    def failed_frame(self, link: Link[HandlerOut, Any], error: BadFrame) -> None:
        """A frame of session `error.handle` was refused, or could not be sent: end the session."""

    def beat(self, link: Link[HandlerOut, Any], heartbeat: Heartbeat) -> None:
        """The peer's state came, about every 250 ms."""

    def closed(self, link: Link[HandlerOut, Any]) -> None:
        """The stream is over: once after each `opened`; `link.why_closed` says why."""


class Link(Generic[Out, In]):
    """One open stream. Not thread-safe: event loop only.

    Attributes:
        address: of the peer, as dialed or as the transport reports it.
        peer: the peer's hello.
        last_heartbeat: the newest; all zeros before the first.
        why_closed: empty while the link is alive.
        error: what closed the link, if that was an error.
    """

    def __init__(
        self,
        end: End[Out, In],
        address: str,
        ours: Hello,
        greeting: Greeting,
        heartbeat: Callable[[], Heartbeat],
        handler: PairHandler[Out, In],
    ) -> None:
        self.address = address
        self.peer = greeting.hello
        self.last_heartbeat = greeting.heartbeat
        self.why_closed = ""
        self.error: TreecastError | None = None
        self._end = end
        self._heartbeat = heartbeat
        self._handler = handler
        self._limits = Limits(
            vocab_size=ours.vocab_size or self.peer.vocab_size,
            num_proposers=(
                len(self.peer.proposers) if end.peer_role is Role.SPECULATOR else MAX_PROPOSERS
            ),
        )
        self._outbox: Outbox[Out | Heartbeat] = Outbox()
        self._over = asyncio.Event()
        self._opened = False
        self._silent_beats = 0
        self._complaints = 0

    @property
    def alive(self) -> bool:
        return not self._over.is_set()

    def send(self, frame: Out, waits: bool = False) -> None:
        """Queue a frame, merged with what waits for its session. Never blocks; no-op once closed.

        A peer that lets too many sessions pile up loses the link.

        Args:
            waits: it goes with whatever is sent next, a heartbeat at the latest: waking the peer
                for it would cost more than it tells.
        """
        self._put(frame, waits)

    async def sent(self) -> None:
        """Wait until all that was queued has been written; `close` drops what has not."""
        await self._outbox.sent()

    def close(self, reason: str, error: TreecastError | None = None) -> None:
        """End the stream; the handler's `closed` runs before this returns. Safe to repeat."""
        if not self.alive:
            return
        self.why_closed, self.error = reason, error
        self._over.set()
        self._outbox.close()
        log.info("stream closed", peer=self.peer.instance_id, address=self.address, why=reason)
        if self._opened:
            self._notify_closed()

    def _notify_closed(self) -> None:
        try:
            self._handler.closed(self)
        except Exception as error:
            log.error("handler failed", peer=self.peer.instance_id, exc_info=error)

    async def run(self, messages: AsyncIterator[Any]) -> None:
        """Hand the link to the handler and read until either side ends it; never raises."""
        if not self.alive:
            return
        log.info("stream opened", peer=self.peer.instance_id, address=self.address)
        works = (self._read(messages), self._beat(), self._over.wait())
        tasks = [asyncio.create_task(work) for work in works]
        try:
            self._opened = True
            self._handler.opened(self)
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except Exception as error:
            self._close_by(error)
        finally:
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                self._close_by(ended)
            self.close("this side ended the stream")

    def _close_by(self, ended: object) -> None:
        if isinstance(ended, TreecastError):
            self.close(ended.message, ended)
        elif isinstance(ended, Exception):
            log.error("stream failed", peer=self.peer.instance_id, exc_info=ended)
            self.close("internal error", TreecastError("internal error"))

    async def outgoing(self) -> AsyncIterator[Any]:
        """Messages to write, until the link is over; the greeting is not among them."""
        while frames := await self._outbox.take():
            for message in pack(self._end.encode, frames, self._fail):
                yield message

    # --- out ----------------------------------------------------------------------------------

    def _put(self, frame: Out | Heartbeat, waits: bool = False) -> None:
        try:
            self._outbox.put(slot_key(frame), frame, waits)
        except TreecastError as error:
            self.close(error.message, error)

    async def _beat(self) -> None:
        """Send heartbeats, and count those after which nothing had come from the peer.

        Counting, rather than reading the clock, forgives stalls of this process.
        """
        while self._silent_beats <= SILENCE_S / HEARTBEAT_S:
            await asyncio.sleep(HEARTBEAT_S)
            self._silent_beats += 1
            self._put(self._heartbeat())
        raise Unavailable(f"peer was silent for {SILENCE_S} s")

    # --- in -----------------------------------------------------------------------------------

    async def _read(self, messages: AsyncIterator[Any]) -> None:
        try:
            async for message in messages:
                self._silent_beats = 0
                for number, frame in enumerate(self._end.decode(message, self._limits), start=1):
                    self._deliver(frame)
                    if number % FRAMES_PER_TURN == 0:
                        await asyncio.sleep(0)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        self.close("peer ended the stream")

    def _deliver(self, frame: In | Hello | Heartbeat | InvalidFrame) -> None:
        if not self.alive:
            return
        if isinstance(frame, Heartbeat):
            check_alive(frame)
            self.last_heartbeat = frame
            self._handler.beat(self, frame)
        elif isinstance(frame, BadFrame):
            self._complain("bad frame", frame.message)
            self._handler.failed_frame(self, frame)
        elif isinstance(frame, InvalidFrame | Hello):
            self._complain("ignored frame", repr(frame))
        else:
            self._receive(frame)

    def _receive(self, frame: In) -> None:
        try:
            self._handler.received(self, frame)
        except TreecastError as error:
            self._fail(frame, error)
        except Exception as error:
            log.error("frame failed", peer=self.peer.instance_id, exc_info=error)
            self._fail(frame, TreecastError("internal error"))

    def _fail(self, frame: object, error: TreecastError) -> None:
        handle = getattr(frame, "handle", None)
        self._complain("frame failed", error.message)
        if handle is not None:
            self._handler.failed_frame(self, BadFrame(handle, error))

    def _complain(self, event: str, why: str) -> None:
        """Log the first, second, fourth, eighth, ... complaint, so that no peer floods the log."""
        self._complaints += 1
        if self._complaints & (self._complaints - 1) == 0:
            log.warning(event, peer=self.peer.instance_id, why=why, count=self._complaints)
