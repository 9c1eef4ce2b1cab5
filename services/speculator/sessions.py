"""Verifiers' streams and their sessions: which frame is acted on, and who gets which tree."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog

from treecast.drafting.base import DraftRequest
from treecast.errors import Overloaded, TreecastError
from treecast.sampling.compiler import GrammarCompiler
from treecast.sampling.grammar import Matcher
from treecast.sampling.noise import derived_key
from treecast.sampling.params import Law
from treecast.telemetry.traces import NoTracing, Tracing, is_told
from treecast.wire.frames import (
    Attach,
    BadFrame,
    Commit,
    Detach,
    Draft,
    Heartbeat,
    NeedSync,
    Refused,
    SpeculatorFrame,
    VerifierFrame,
)
from treecast.wire.link import Link

from .metrics import SpeculatorMetrics
from .orders import Advance, Close, Grown, Open, Order, Result

VerifierLink = Link[SpeculatorFrame, VerifierFrame]

log = structlog.get_logger()


@dataclass(slots=True)
class Session:
    """One attached session.

    Attributes:
        number: the drafter's handle; another one after each attach, so that a tree which was
            grown before it is told from those grown after.
        length: tokens committed as far as this speculator was told.
        law: that its trees are for.
        in_sync: false from a gap in the commits until the verifier attaches anew.
    """

    number: int
    length: int
    law: Law
    in_sync: bool = True


@dataclass(slots=True)
class Told:
    """The trace that a session's drafts belong to, and how many there were."""

    traceparent: str
    num_drafts: int = 0


@dataclass(frozen=True, slots=True)
class Route:
    """Where trees of a session go."""

    link: VerifierLink
    handle: int
    told: Told


@dataclass(slots=True)
class Sessions:
    """All verifiers' sessions. A `PairHandler`; lives on the event loop.

    Attributes:
        submit: takes orders for the drafting thread. They are handed over once per turn of the
            loop, so that a message's frames are drafted for as one batch.
        capacity: sessions that one stream may attach.
        max_sessions: sessions of all streams together.
        instance_id: our own; no two processes draw alike.
        grammars: of the drafts' tokenizer, so that nothing masked is proposed. A session whose
            grammar is still being compiled drafts freely, and attaches anew once it is there;
            under `mss` it draws to its end from what it began with.
    """

    submit: Callable[[Sequence[Order]], None]
    capacity: int
    max_sessions: int
    metrics: SpeculatorMetrics
    instance_id: str
    tracing: Tracing = field(default_factory=NoTracing)
    grammars: GrammarCompiler = field(default_factory=lambda: GrammarCompiler(None))
    draining: bool = False
    _streams: dict[VerifierLink, dict[int, Session]] = field(default_factory=dict)
    _routes: dict[int, Route] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _waiting: set[asyncio.Task[None]] = field(default_factory=set)
    _orders: list[Order] = field(default_factory=list)
    _none_left: asyncio.Event = field(default_factory=asyncio.Event)

    def __len__(self) -> int:
        return len(self._routes)

    async def finished(self) -> None:
        """Wait until no session is attached."""
        while self._routes:
            self._none_left.clear()
            await self._none_left.wait()

    def move(self) -> tuple[int, int]:
        """Have sessions attach anew, to drafters that have changed; those under `mss` stay.

        Returns:
            How many will, and how many stay.
        """
        attached = [
            (link, handle, session)
            for link, mine in self._streams.items()
            for handle, session in mine.items()
            if session.in_sync
        ]
        moving = [one for one in attached if one[2].law is not Law.MSS]
        for link, handle, session in moving:
            self._ask_to_attach_anew(link, handle, session)
        return len(moving), len(attached) - len(moving)

    # --- PairHandler ------------------------------------------------------------------------

    def opened(self, link: VerifierLink) -> None:
        self._streams[link] = {}

    def closed(self, link: VerifierLink) -> None:
        """The verifier is gone, or dials again: its sessions end."""
        for handle in list(self._streams[link]):
            self._end(link, handle)
        del self._streams[link]

    def beat(self, link: VerifierLink, heartbeat: Heartbeat) -> None:
        """Liveness is the stream's concern; nothing to do."""

    def failed_frame(self, link: VerifierLink, error: BadFrame) -> None:
        """What was meant is unknown, so the session cannot go on here."""
        self._refuse(link, error.handle, error.cause)

    def received(self, link: VerifierLink, frame: VerifierFrame) -> None:
        match frame:
            case Attach():
                self._attach(link, frame)
            case Commit():
                self._commit(link, frame)
            case Detach():
                if not self._end(link, frame.handle):
                    self.metrics.unknown_frames.inc()

    # --- frames -------------------------------------------------------------------------------

    def _attach(self, link: VerifierLink, attach: Attach) -> None:
        self._end(link, attach.handle)
        self._check_admission(link, attach)
        session = Session(next(self._numbers), len(attach.tokens), attach.speculation.law)
        self._streams[link][attach.handle] = session
        self._routes[session.number] = Route(link, attach.handle, Told(attach.traceparent))
        self.metrics.sessions.set(len(self._routes))
        request = DraftRequest(
            attach.tokens,
            attach.prompt_len,
            attach.sampling,
            attach.noise_key,
            attach.speculation,
            derived_key(attach.noise_key, self.instance_id),
            self._grammar(session, attach),
        )
        self._order(Open(session.number, request, attach.node_budget, attach.tokens_per_s))

    def _grammar(self, session: Session, attach: Attach) -> Matcher | None:
        """To mask drafts by; none yet while it is compiled, none at all where it cannot be."""
        if not attach.sampling.constraint[0] or not self.grammars.keeps_grammars:
            return None
        ready = self.grammars.ready(attach.sampling)
        if ready is None:
            waiting = asyncio.create_task(self._attach_anew_with_grammar(session, attach))
            self._waiting.add(waiting)
            waiting.add_done_callback(self._waiting.discard)
        return ready

    async def _attach_anew_with_grammar(self, session: Session, attach: Attach) -> None:
        try:
            await self.grammars.matcher(attach.sampling)
        except TreecastError:
            return  # what cannot be kept here is left to the target
        route = self._routes.get(session.number)
        if route is not None and session.in_sync and session.law is not Law.MSS:
            self._ask_to_attach_anew(route.link, route.handle, session)

    def _ask_to_attach_anew(self, link: VerifierLink, handle: int, session: Session) -> None:
        session.in_sync = False
        self._order(Close(session.number))
        link.send(NeedSync(handle))

    def _check_admission(self, link: VerifierLink, attach: Attach) -> None:
        """Raise what the attach is refused for; it comes back as a failed frame."""
        if self.draining:
            raise Overloaded("speculator is draining")
        mine = len(self._streams[link])
        if mine >= self.capacity:
            raise Overloaded(f"stream has {mine} sessions; the limit is {self.capacity}")
        if len(self._routes) >= self.max_sessions:
            raise Overloaded(
                f"speculator has {len(self._routes)} sessions; the limit is {self.max_sessions}"
            )

    def _commit(self, link: VerifierLink, commit: Commit) -> None:
        session = self._streams[link].get(commit.handle)
        if session is None:
            self.metrics.unknown_frames.inc()
        elif session.in_sync and commit.from_len == session.length:
            session.length += len(commit.tokens)
            budget, rate = commit.node_budget, commit.tokens_per_s
            self._order(Advance(session.number, commit.tokens, budget, rate))
        elif session.in_sync:
            self.metrics.resyncs.inc()
            self._ask_to_attach_anew(link, commit.handle, session)

    def _end(self, link: VerifierLink, handle: int) -> bool:
        """Forget a session, if there is one; tells whether there was."""
        session = self._streams[link].pop(handle, None)
        if session is None:
            return False
        del self._routes[session.number]
        self.metrics.sessions.set(len(self._routes))
        self._order(Close(session.number))
        if not self._routes:
            self._none_left.set()
        return True

    def _refuse(self, link: VerifierLink, handle: int, error: TreecastError) -> None:
        self._end(link, handle)
        self.metrics.refused.labels(error.reason).inc()
        log.info("session.refused", peer=link.peer.instance_id, why=error.message)
        link.send(Refused(handle, error.message, isinstance(error, Overloaded)))

    def _order(self, order: Order) -> None:
        if not self._orders:
            asyncio.get_running_loop().call_soon(self._hand_over)
        self._orders.append(order)

    def _hand_over(self) -> None:
        orders, self._orders = self._orders, []
        self.submit(orders)

    # --- results --------------------------------------------------------------------------------

    def deliver(self, results: Sequence[Result]) -> None:
        """Send what was grown to whom it belongs, unless the session has ended meanwhile."""
        for result in results:
            route = self._routes.get(result.session)
            if route is None:
                continue
            if isinstance(result, Grown):
                self.metrics.trees.inc()
                self.metrics.nodes.inc(len(result.tree))
                if self.tracing.on:
                    self._tell(route.told, result)
                route.link.send(
                    Draft(route.handle, result.base_len, result.tree, result.drafting_us)
                )
            else:
                self._refuse(route.link, route.handle, result.error)

    def _tell(self, told: Told, grown: Grown) -> None:
        """A span for a draft, now and then."""
        told.num_drafts += 1
        if not is_told(told.num_drafts):
            return
        now = time.monotonic()
        facts = {
            "treecast.draft": told.num_drafts,
            "treecast.base_len": grown.base_len,
            "treecast.nodes": len(grown.tree),
            "treecast.depth": max(grown.tree.depths, default=0),
        }
        began = now - grown.drafting_us / 1e6
        self.tracing.record("treecast.draft", told.traceparent, began, now, facts)
