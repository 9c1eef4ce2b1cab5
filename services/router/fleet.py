"""The verifiers of a router: one stream to each, and who sits on it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import grpc

from treecast.errors import InvalidFrame, TreecastError, Unavailable
from treecast.sampling.params import Law
from treecast.v1.verifier_pb2_grpc import VerifierServiceStub
from treecast.wire.breaker import Breaker
from treecast.wire.channel import MAX_ANSWER_BYTES, is_cancelled, open_channel
from treecast.wire.frames import (
    BadFrame,
    Completed,
    Failed,
    Forget,
    Heartbeat,
    Hello,
    Role,
    ServingFrame,
    SessionKey,
)
from treecast.wire.hop import SERVE
from treecast.wire.registry import Entry
from treecast.wire.status import from_rpc_error
from treecast.wire.streams import Streams
from treecast.wire.tls import Tls

from .placement import Candidate, Placement
from .seat import Lost, Seat, SeatEnd, VerifierLink

if TYPE_CHECKING:
    from treecast.v1.verifier_pb2_grpc import VerifierServiceAsyncStub  # a name of the stubs only

T = TypeVar("T")

BREAKER_THRESHOLD = 5
BREAKER_PAUSE_S = 2.0


class Verifier:
    """One address that is dialed: its stream while open, and the requests that sit on it."""

    def __init__(
        self,
        address: str,
        link: VerifierLink | None = None,
        stream: int = 0,
        tls: Tls | None = None,
        breaker: Breaker | None = None,
    ) -> None:
        self.address = address
        self.link = link
        self.stream = stream
        self.breaker = breaker or new_breaker()
        self._tls = tls
        self.seats: dict[int, Seat] = {}
        self.seated_at_beat = 0
        self._channel: grpc.aio.Channel | None = None

    @property
    def stub(self) -> VerifierServiceAsyncStub:
        """For unary calls, on a channel of their own that opens when it is first needed."""
        if self._channel is None:
            self._channel = open_channel(
                self.address,
                tls=self._tls,
                peer_role=Role.VERIFIER.name.lower(),
                max_message_bytes=MAX_ANSWER_BYTES,
            )
        return VerifierServiceStub(self._channel)

    @property
    def candidate(self) -> Candidate | None:
        """None while no stream is open."""
        if self.link is None or not self.link.alive:
            return None
        return Candidate(
            self.link.peer,
            self.link.last_heartbeat,
            self.stream,
            len(self.seats),
            self.seated_at_beat,
            self.breaker.allows,
        )

    def note_end(self, end: SeatEnd) -> None:
        """A request ended here: many in a row that it could not serve, and it gets a rest."""
        if isinstance(end, Completed):
            self.breaker.succeeded()
        elif isinstance(end, Failed) and is_sick(end.error):
            self.note_failure()

    def note_failure(self) -> None:
        """One more in a row, unless it is handing over what it has."""
        if self.link is None or not self.link.last_heartbeat.draining:
            self.breaker.failed()

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()


def new_breaker() -> Breaker:
    return Breaker(BREAKER_THRESHOLD, BREAKER_PAUSE_S)


def is_sick(error: TreecastError) -> bool:
    """Whether a request failed for its verifier's fault, rather than its own."""
    return type(error) in (TreecastError, Unavailable, InvalidFrame)


async def answer(call: Awaitable[T]) -> T:
    """Wait for a unary call to a verifier, whose channel goes with its stream.

    Raises:
        TreecastError: what the call failed with; Unavailable if its channel was closed.
    """
    try:
        return await call
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None
    except asyncio.CancelledError:
        if is_cancelled():
            raise
        raise Unavailable("verifier's stream closed") from None


class Fleet:
    """Dials what the registry lists and hands out seats. A `PairHandler`; event loop only."""

    def __init__(self, instance_id: str, tls: Tls | None = None) -> None:
        hello = Hello(instance_id, Role.ROUTER, laws=tuple(Law))
        self._tls = tls
        self._streams = Streams(SERVE, lambda: hello, Heartbeat, self, tls)
        self._breakers: dict[str, Breaker] = {}
        self._open: dict[str, Verifier] = {}
        self._handles = itertools.count(1)
        self._numbers = itertools.count(1)
        self._closing: set[asyncio.Task[None]] = set()
        self._watchers: list[Callable[[], None]] = []
        self._changed = asyncio.Event()
        self.models_seen: set[str] = set()

    @property
    def verifiers(self) -> list[Verifier]:
        """All that are dialed, by address."""
        addresses = [dialer.address for dialer in self._streams.dialers]
        return [self._open.get(address) or Verifier(address) for address in addresses]

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call back whenever a stream opens or closes, a heartbeat comes or a seat gets free."""
        self._watchers.append(watcher)

    def candidates(self) -> list[Candidate]:
        """The healthy ones, draining or not."""
        found = (verifier.candidate for verifier in self._open.values())
        return [candidate for candidate in found if candidate is not None]

    def open_hellos(self) -> list[Hello]:
        """Of the verifiers that take new requests."""
        return [one.hello for one in self.candidates() if not one.beat.draining]

    def by_instance(self, instance_id: str) -> Verifier | None:
        """The verifier's process, if its stream is open."""
        for verifier in self._open.values():
            link = verifier.link
            if link is not None and link.alive and link.peer.instance_id == instance_id:
                return verifier
        return None

    async def until(self, look: Callable[[], T | None], timeout_s: float | None) -> T | None:
        """What `look` returns, as soon as that is not None; None after the timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                while (found := look()) is None:
                    self._changed.clear()
                    await self._changed.wait()
                return found
        except TimeoutError:
            return None

    # --- who is dialed ------------------------------------------------------------------------

    def follow(self, entries: tuple[Entry, ...]) -> None:
        """Dial what the registry lists."""
        self._streams.follow(entries)
        dialed = {dialer.address for dialer in self._streams.dialers}
        for address in self._breakers.keys() - dialed:
            del self._breakers[address]

    async def close(self) -> None:
        await self._streams.close()
        await asyncio.gather(*self._closing)

    def forget(self, instance_id: str, session: SessionKey) -> None:
        """Have a verifier free what it retains of a session; nothing to do if it is gone."""
        verifier = self.by_instance(instance_id)
        if verifier is not None and verifier.link is not None:
            verifier.link.send(Forget(session))

    # --- seats --------------------------------------------------------------------------------

    def seat(self, placement: Placement) -> Seat:
        """Take a place on a verifier that is open now."""
        verifier = self.by_instance(placement.instance_id)
        assert verifier is not None
        assert verifier.link is not None
        handle = next(self._handles)
        seat = Seat(
            handle,
            verifier.stream,
            verifier.link,
            lambda: self._vacate(verifier, handle),
            verifier.note_end,
        )
        verifier.breaker.trying()
        verifier.seats[handle] = seat
        return seat

    def _vacate(self, verifier: Verifier, handle: int) -> None:
        if verifier.seats.pop(handle, None) is not None:
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        for watcher in self._watchers:
            watcher()

    # --- PairHandler --------------------------------------------------------------------------

    def opened(self, link: VerifierLink) -> None:
        breaker = self._breakers.setdefault(link.address, new_breaker())
        self._open[link.address] = Verifier(
            link.address, link, next(self._numbers), self._tls, breaker
        )
        self.models_seen.add(link.peer.model)
        self.models_seen.update(one.name for one in link.peer.adapters)
        self._notify()

    def received(self, link: VerifierLink, frame: ServingFrame) -> None:
        """Frames of requests that have left are those that were on their way; they are dropped."""
        seat = self._find(link, frame.handle)
        if seat is not None:
            seat.put(frame)

    def failed_frame(self, link: VerifierLink, error: BadFrame) -> None:
        seat = self._find(link, error.handle)
        if seat is not None:
            seat.fail(error.cause)

    def beat(self, link: VerifierLink, heartbeat: Heartbeat) -> None:
        verifier = self._open[link.address]
        verifier.seated_at_beat = len(verifier.seats)
        self._notify()

    def closed(self, link: VerifierLink) -> None:
        verifier = self._open.pop(link.address)
        seats, verifier.seats = list(verifier.seats.values()), {}
        if seats:
            verifier.note_failure()
        for seat in seats:
            seat.put(Lost(link.why_closed))
        task = asyncio.create_task(verifier.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        self._notify()

    def _find(self, link: VerifierLink, handle: int) -> Seat | None:
        return self._open[link.address].seats.get(handle)
