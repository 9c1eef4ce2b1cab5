"""The verifiers of a router: one stream to each, and who sits on it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import grpc

from treecast.errors import DuplicateRequest
from treecast.sampling.params import Law
from treecast.v1.verifier_pb2_grpc import VerifierServiceStub
from treecast.wire.channel import open_channel
from treecast.wire.frames import (
    BadFrame,
    Forget,
    Heartbeat,
    Hello,
    Role,
    RouterFrame,
    ServingFrame,
    SessionKey,
)
from treecast.wire.pair import SERVE, Dialer
from treecast.wire.registry import Entry

from .placement import Candidate, Placement
from .seat import Lost, Seat, VerifierLink

if TYPE_CHECKING:
    from treecast.v1.verifier_pb2_grpc import VerifierServiceAsyncStub  # a name of the stubs only

T = TypeVar("T")

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Tokenizer definitions of large vocabularies take tens of megabytes."""


class Verifier:
    """One address that is dialed, and the requests that sit on its stream."""

    def __init__(self, address: str, dialer: Dialer[RouterFrame, ServingFrame]) -> None:
        self.address = address
        self.dialer = dialer
        self.link: VerifierLink | None = None
        self.seats: dict[int, Seat] = {}
        self.seated_at_beat = 0
        self._channel: grpc.aio.Channel | None = None

    @property
    def stub(self) -> VerifierServiceAsyncStub:
        """For unary calls, on a channel of their own that opens when it is first needed."""
        if self._channel is None:
            self._channel = open_channel(self.address, max_message_bytes=MAX_ANSWER_BYTES)
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
        self._listed: frozenset[str] = frozenset()
        self._aliases: dict[str, str] = {}  # address -> instance that we know by another one
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
        """Dial new addresses; give up those that are neither listed any more nor answer."""
        self._listed = frozenset(entry.address for entry in entries)
        for address in self._listed - self._verifiers.keys() - self._aliases.keys():
            self._dial(address)
        for verifier in self.verifiers:
            if verifier.candidate is None and verifier.address not in self._listed:
                self._drop(verifier)

    async def close(self) -> None:
        for verifier in self.verifiers:
            self._drop(verifier)
        await asyncio.gather(*self._closing)

    def _dial(self, address: str) -> None:
        dialer = Dialer(address, SERVE, lambda: self._hello, Heartbeat, self)
        self._verifiers[address] = Verifier(address, dialer)
        dialer.start()

    def _drop(self, verifier: Verifier) -> None:
        del self._verifiers[verifier.address]
        task = asyncio.create_task(verifier.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

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
        self._redial(verifier, link)
        self._notify()

    def _redial(self, verifier: Verifier, link: VerifierLink) -> None:
        """Leave the dialer to it, unless the address is no longer wanted.

        A verifier keeps one stream per router. So two addresses of one verifier would take its
        stream from each other for ever: the one that lost it waits until that process is gone.
        """
        instance = link.peer.instance_id
        if isinstance(link.error, DuplicateRequest):
            self._aliases[verifier.address] = instance
            self._drop(verifier)
            return
        if verifier.address not in self._listed:
            self._drop(verifier)
        freed = {address for address, of in self._aliases.items() if of == instance}
        for address in freed:
            del self._aliases[address]
        for address in freed & self._listed:
            self._dial(address)

    def _find(self, link: VerifierLink, handle: int) -> Seat | None:
        verifier = self._verifiers.get(link.address)
        return verifier.seats.get(handle) if verifier else None
