"""The verifiers of a router: one stream to each, and who sits on it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import TypeVar

import grpc
import structlog

from treecast.errors import DuplicateRequest
from treecast.sampling.params import Law
from treecast.v1.verifier_pb2_grpc import VerifierServiceStub
from treecast.wire.channel import open_channel
from treecast.wire.frames import (
    BadFrame,
    Heartbeat,
    Hello,
    Role,
    RouterFrame,
    ServingFrame,
)
from treecast.wire.pair import SERVE, Dialer, Link
from treecast.wire.registry import Entry

from .placement import Candidate, Placement
from .seat import Lost, Seat, VerifierLink

T = TypeVar("T")

log = structlog.get_logger()


class Verifier:
    """One address that is dialed, and the requests that sit on its stream."""

    def __init__(self, address: str, dialer: Dialer[RouterFrame, ServingFrame]) -> None:
        self.address = address
        self.dialer = dialer
        self.link: VerifierLink | None = None
        self.seats: dict[int, Seat] = {}
        self.seated_at_beat = 0
        self.listed = True
        self._channel: grpc.aio.Channel | None = None

    @property
    def stub(self) -> VerifierServiceStub:
        """For unary calls, on a channel of their own that opens when it is first needed."""
        if self._channel is None:
            self._channel = open_channel(self.address)
        return VerifierServiceStub(self._channel)

    @property
    def candidate(self) -> Candidate | None:
        """None while no stream is open."""
        if self.link is None or not self.link.alive:
            return None
        return Candidate(
            self.link.peer, self.link.last_heartbeat, len(self.seats), self.seated_at_beat
        )

    async def close(self) -> None:
        await self.dialer.close()
        if self._channel is not None:
            await self._channel.close()


class Fleet:
    """Dials what the registry lists and hands out seats. A `PairHandler`; event loop only."""

    def __init__(self, instance_id: str) -> None:
        self._hello = Hello(instance_id, Role.ROUTER, laws=tuple(Law))
        self._verifiers: dict[str, Verifier] = {}
        self._aliases: dict[str, str] = {}  # address -> the one by which we know its verifier
        self._handles = itertools.count(1)
        self._closing: set[asyncio.Task[None]] = set()
        self._watchers: list[Callable[[], None]] = []
        self._changed = asyncio.Event()
        self.models_seen: set[str] = set()

    @property
    def verifiers(self) -> list[Verifier]:
        """All that are dialed, by address."""
        return [self._verifiers[address] for address in sorted(self._verifiers)]

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call back whenever a stream opens or closes, a heartbeat comes or a seat gets free."""
        self._watchers.append(watcher)

    def candidates(self) -> list[Candidate]:
        """The healthy ones, draining or not."""
        found = (verifier.candidate for verifier in self.verifiers)
        return [candidate for candidate in found if candidate is not None]

    def open_hellos(self) -> list[Hello]:
        """Of the verifiers that take new requests."""
        return [one.hello for one in self.candidates() if not one.beat.draining]

    def by_instance(self, instance_id: str) -> Verifier | None:
        """The verifier's process, if its stream is open."""
        for verifier in self._verifiers.values():
            candidate = verifier.candidate
            if candidate is not None and candidate.instance_id == instance_id:
                return verifier
        return None

    async def until(self, look: Callable[[], T | None], timeout_s: float) -> T | None:
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
        """Dial new addresses; give up those that are neither listed any more nor answer."""
        listed = {entry.address for entry in entries}
        for address in listed - self._verifiers.keys() - self._aliases.keys():
            self._dial(address)
        for verifier in self.verifiers:
            verifier.listed = verifier.address in listed
            if not verifier.listed and verifier.candidate is None:
                self._drop(verifier)

    async def close(self) -> None:
        for verifier in self.verifiers:
            self._drop(verifier)
        await asyncio.gather(*self._closing)

    def _dial(self, address: str) -> None:
        dialer = Dialer(
            address,
            SERVE,
            lambda: self._hello,
            Heartbeat,
            self,
            check=lambda hello: self._refuse_twin(address, hello),
        )
        self._verifiers[address] = Verifier(address, dialer)
        dialer.start()

    def _refuse_twin(self, address: str, hello: Hello) -> None:
        """A verifier keeps one stream per router, so two names of one would take turns for ever."""
        known = self.by_instance(hello.instance_id)
        if known is None or known.address == address:
            return
        self._aliases[address] = known.address
        self._drop(self._verifiers[address])
        raise DuplicateRequest(f"{address} is the verifier that {known.address} is")

    def _drop(self, verifier: Verifier) -> None:
        del self._verifiers[verifier.address]
        names = self._aliases.items()
        self._aliases = {name: of for name, of in names if of != verifier.address}
        task = asyncio.create_task(verifier.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # --- seats --------------------------------------------------------------------------------

    def seat(self, placement: Placement) -> Seat:
        """Take a place on a verifier that is open now."""
        verifier = self.by_instance(placement.instance_id)
        assert verifier is not None
        assert verifier.link is not None
        handle = next(self._handles)
        seat = Seat(handle, verifier.link, lambda: self._vacate(verifier, handle))
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
        verifier = self._verifiers.get(link.address)
        if verifier is None:
            link.close("no longer wanted")
            return
        verifier.link = link
        verifier.seated_at_beat = 0
        self.models_seen.add(link.peer.model)
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
        verifier = self._verifiers.get(link.address)
        if verifier is not None:
            verifier.seated_at_beat = len(verifier.seats)
            self._notify()

    def closed(self, link: VerifierLink) -> None:
        verifier = self._verifiers.get(link.address)
        if verifier is None or verifier.link is not link:
            return
        verifier.link = None
        seats, verifier.seats = list(verifier.seats.values()), {}
        for seat in seats:
            seat.put(Lost(link.why_closed))
        if not verifier.listed:
            self._drop(verifier)
        self._notify()

    def _find(self, link: VerifierLink, handle: int) -> Seat | None:
        verifier = self._verifiers.get(link.address)
        return verifier.seats.get(handle) if verifier else None
