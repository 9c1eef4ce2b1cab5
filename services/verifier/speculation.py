"""Which speculators draft which request, and what they have sent.

Everything here runs on the event loop and costs nothing when no speculator is attached. Frames
from speculators are input: they can waste a step's rows, never change a token; but under the law
mss, where they are believed, so that only trusted speculators draft.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

import structlog

from treecast.sampling.params import Law
from treecast.tree import MAX_DEPTH, TokenTree
from treecast.wire.codec.bounds import MAX_PROPOSERS
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
)

from .attachments import Attachment, Origin, Owed, Speculator, SpeculatorLink, Turn
from .calibration import Calibration, PodCalibration
from .choice import Offer, TreePolicy
from .choice.vote import voter_names
from .metrics.trees import TreeMetrics
from .requests import Request

log = structlog.get_logger()


class Speculation:
    """All speculators, and all requests' attachments to them. A `PairHandler` for their streams."""

    def __init__(
        self,
        policy: TreePolicy,
        max_nodes: int,
        trusted: Collection[str],
        metrics: TreeMetrics,
    ) -> None:
        """Begin without speculators.

        Args:
            policy: who drafts a request, and what of the drafts is verified.
            max_nodes: of one session's tree.
            trusted: addresses whose draws are believed, or "all"; only these serve the law mss.
        """
        self.policy = policy
        self._max_nodes = max_nodes
        self._trusted = trusted
        self._metrics = metrics
        self._calibration = PodCalibration(metrics.proposer_label)
        metrics.watch(self._calibration.reliability)
        self._speculators: dict[int, Speculator] = {}
        self._requests: dict[int, Request] = {}
        self._attachments: dict[int, list[Attachment]] = {}
        self.on_tree: Callable[[], None] = lambda: None
        self.tokens_per_s = 0.0
        """Of each request, lately; what drafting time is worth. 0: nothing."""

    @property
    def instances(self) -> list[str]:
        return sorted(s.link.peer.instance_id for s in self._speculators.values())

    # --- requests come and go ---------------------------------------------------------------

    def admit(self, request: Request) -> None:
        """Attach a request to the speculators that the policy chooses."""
        self._requests[request.handle] = request
        self._attachments[request.handle] = []
        self._attach_free(request)

    def release(self, request: Request) -> None:
        """Forget a request that has ended; others may have its slots."""
        self._requests.pop(request.handle, None)
        attached = self._attachments.pop(request.handle, [])
        for attachment in attached:
            attachment.speculator.sessions.discard(request.handle)
            attachment.speculator.link.send(Detach(request.handle))
            self._leave(attachment)
        for speculator in self._speculators.values():
            speculator.refused.discard(request.handle)
            speculator.put_off.discard(request.handle)
        self.policy.released(request)
        for attachment in attached:
            self._offer_room(attachment.speculator)

    def _offer_room(self, speculator: Speculator) -> None:
        """It has room: let it be asked by whoever lacks one, and anew by the oldest put off.

        By one of those at a time, since what it is short of may not be slots.
        """
        if speculator.put_off:
            speculator.put_off.remove(min(speculator.put_off))
        for request in self._requests.values():
            self._attach_free(request)

    def _attach_free(self, request: Request) -> None:
        attached = self._attachments[request.handle]
        while self._budget(request) > 0 and len(attached) < self.policy.per_session:
            taken = [attachment.speculator for attachment in attached]
            taken += [s for s in self._speculators.values() if not self._may_draft(s, request)]
            free = [s for s in self._speculators.values() if s not in taken and s.has_room]
            if not free:
                return
            self._attach(request, self.policy.choose(request, free, taken))

    def _attach(self, request: Request, speculator: Speculator) -> Attachment:
        attached = self._attachments[request.handle]
        free = set(range(len(attached) + 1)) - {a.place for a in attached}
        calibration = Calibration(self._calibration, speculator.link.peer.proposers)
        attachment = Attachment(speculator, min(free), calibration)
        attached.append(attachment)
        speculator.sessions.add(request.handle)
        speculator.breaker.trying()
        self._sync(request, attachment)
        return attachment

    def _may_draft(self, speculator: Speculator, request: Request) -> bool:
        """Under mss the output is only as right as the distributions that speculators report."""
        law, link = request.start.speculation.law, speculator.link
        trusted = "all" in self._trusted or link.address in self._trusted
        serves = law is Law.REPLAY or (trusted and law in link.peer.laws)
        turned_down = request.handle in speculator.refused | speculator.put_off
        return serves and not turned_down

    def _sync(self, request: Request, attachment: Attachment) -> None:
        attachment.asked_at, attachment.turn = time.monotonic(), Turn.CATCH_UP
        attachment.speculator.link.send(
            Attach(
                request.handle,
                tuple(request.tokens),
                request.prompt_len,
                request.start.sampling,
                request.start.noise_key,
                self._budget(request),
                request.start.speculation,
                self.tokens_per_s,
                request.span.traceparent,
            )
        )

    def _budget(self, request: Request) -> int:
        asked = request.start.speculation.max_nodes
        return self._max_nodes if asked is None else min(asked, self._max_nodes)

    # --- the step asks and tells --------------------------------------------------------------

    def tree(self, request: Request, room: int) -> TokenTree:
        """What the request's speculators have guessed, at most `room` nodes of it.

        Confidence is calibrated.
        """
        budget = min(self._budget(request), request.tokens_left - 1, room)
        attachments = self._attachments.get(request.handle, ())
        for attachment in attachments:
            attachment.offered, attachment.offered_origin = attachment.tree, attachment.origin
            attachment.answered = attachment.asked_at is None and attachment.turn is Turn.DRAFT
        offering = [attachment for attachment in attachments if attachment.tree.tokens]
        if request.start.report_rounds:
            request.drafted_by = tuple(offering)
        offers = [_offer(attachment) for attachment in offering]
        if not offers or budget <= 0:
            return TokenTree()
        depth = min(MAX_DEPTH, request.tokens_left - 1)
        return self.policy.combine(request, offers, budget, depth)

    def rearrange(self) -> None:
        """Once per step: let the policy move requests to other speculators."""
        wanting = {
            handle: attachments
            for handle, attachments in self._attachments.items()
            if self._budget(self._requests[handle]) > 0
        }
        moves = self.policy.rearrange(
            wanting,
            tuple(self._speculators.values()),
            lambda handle, speculator: self._may_draft(speculator, self._requests[handle]),
        )
        for handle, speculator in moves.items():
            self._move(self._requests[handle], speculator)

    def _move(self, request: Request, speculator: Speculator) -> None:
        """Begin a switch: the new speculator reads the text while the old one drafts on.

        To the old one it is a way back: whoever has not taken over by now is let go.
        """
        attached = self._attachments[request.handle]
        if attached and attached[0].speculator is speculator:
            for late in attached[1:]:
                late.speculator.link.send(Detach(request.handle))
                self._drop(late.speculator, request)
        elif speculator.has_room and self._may_draft(speculator, request):
            old = attached[0] if attached else None
            self._attach(request, speculator).replaces = old
            if old is not None:
                self.policy.switched("begun")

    def _take_over(self, request: Request, attachment: Attachment) -> None:
        """A switch's first tree is there: let the old one go, if it has not gone by itself."""
        attached, old = self._attachments[request.handle], attachment.replaces
        if old is None:
            return
        attachment.replaces = None
        self.policy.switched("done")
        if old in attached:
            attached.remove(old)
            old.speculator.sessions.discard(request.handle)
            old.speculator.link.send(Detach(request.handle))
            self._offer_room(old.speculator)

    def proposers(self, request: Request, bits: int) -> set[str]:
        """Names of those that proposed a node of the request's merged tree."""
        return {
            name
            for attachment in self._attachments.get(request.handle, ())
            for k, name in enumerate(attachment.speculator.link.peer.proposers)
            if bits >> (attachment.place * MAX_PROPOSERS + k) & 1
        }

    def owed(self, requests: Iterable[Request]) -> list[Owed]:
        """What speculators owe decoding requests for the text committed last."""
        return [
            owed
            for request in requests
            if request.decoding and request.tokens_left > 1
            if (owed := Owed.of(self._drafting(request))) is not None
        ]

    def waited_in_vain(self, requests: Iterable[Request], waited_s: float) -> None:
        """Trees that were waited for did not come: their speculators are slower than that."""
        for request in requests:
            for attachment in self._drafting(request):
                if attachment.asked_at is not None:
                    attachment.speculator.pace.saw_latency(2 * waited_s)

    def _drafting(self, request: Request) -> list[Attachment]:
        """The request's attachments without one that reads the text to take over from another."""
        attached = self._attachments.get(request.handle, [])
        return [attachment for attachment in attached if attachment.replaces not in attached]

    def committed(self, request: Request, tokens: Sequence[int], proposers: Sequence[int]) -> None:
        """Tokens were committed: learn, re-root, tell the speculators.

        Args:
            proposers: bits of those who proposed each accepted node, in order.
        """
        attachments = self._attachments.get(request.handle, [])
        for attachment in attachments:
            attachment.calibration.learn(attachment.offered, tokens)
            if attachment.answered:
                attachment.speculator.pace.saw_gain(*gain_of(attachment, proposers))
        self.policy.committed(request, attachments, tokens)
        self._choose_turns(attachments)
        for attachment in attachments:
            attachment.tree = attachment.tree.reroot(tokens) or TokenTree()
            asked = attachment.turn is not Turn.SIT_OUT
            attachment.asked_at = time.monotonic() if asked else None
            attachment.speculator.link.send(
                Commit(
                    request.handle,
                    len(request.tokens) - len(tokens),
                    tuple(tokens),
                    self._budget(request) if asked else 0,
                    self.tokens_per_s,
                )
            )

    def _choose_turns(self, attachments: Iterable[Attachment]) -> None:
        """Who drafts on our cores sits out the steps that it would delay for too little.

        The quickest is judged by all that its trees hold, the others by what they add.
        """
        ranked = sorted(attachments, key=lambda each: each.speculator.pace.latency_s)
        for rank, attachment in enumerate(ranked):
            speculator = attachment.speculator
            pays = speculator.pace.pays(self.tokens_per_s, alone=rank == 0)
            attachment.turn = attachment.next_turn(pays or not speculator.shares_cores)

    # --- PairHandler: frames from speculators ---------------------------------------------------

    def opened(self, link: SpeculatorLink) -> None:
        self._speculators[id(link)] = Speculator(link)
        self._metrics.speculators.set(len(self._speculators))
        for request in self._requests.values():
            self._attach_free(request)

    def closed(self, link: SpeculatorLink) -> None:
        gone = self._speculators.pop(id(link), None)
        self._metrics.speculators.set(len(self._speculators))
        if gone is not None:
            self.policy.gone(gone)
        for handle, attachments in self._attachments.items():
            if gone is not None and self._remove(attachments, gone):
                self._attach_free(self._requests[handle])
        self.on_tree()

    def beat(self, link: SpeculatorLink, heartbeat: Heartbeat) -> None:
        """A speculator that had no room may have some now."""
        speculator = self._speculators.get(id(link))
        if speculator is not None and speculator.put_off and heartbeat.free_capacity > 0:
            self._offer_room(speculator)

    def failed_frame(self, link: SpeculatorLink, error: BadFrame) -> None:
        """A bad frame ends its own session's speculation there, nothing else."""
        self._metrics.bad_frames.inc()
        attachment = self._find(link, error.handle)
        if attachment is not None:
            link.send(Detach(error.handle))
            attachment.speculator.breaker.failed()
            self._drop(attachment.speculator, self._requests[error.handle])

    def received(self, link: SpeculatorLink, frame: SpeculatorFrame) -> None:
        self._metrics.received.inc(isinstance(frame, Draft))
        attachment = self._find(link, frame.handle)
        if attachment is None:
            self._metrics.stale_frames.inc()
            return
        request = self._requests[frame.handle]
        match frame:
            case Draft():
                self._draft(request, attachment, frame)
            case NeedSync():
                self._sync(request, attachment)
            case Refused():
                log.info("speculator.refused", peer=link.peer.instance_id, why=frame.why)
                if frame.no_room:
                    self._put_off(attachment.speculator, request)
                else:
                    self._drop(attachment.speculator, request)

    def _draft(self, request: Request, attachment: Attachment, frame: Draft) -> None:
        request.law.check(frame.tree)  # what it raises comes back through `failed_frame`
        self._metrics.nodes_offered.inc(len(frame.tree))
        # Under mss too: what is left below the path was drawn given the path alone, so it does not
        # matter what the target made of the rest, and by what other tree.
        behind = len(request.tokens) - frame.base_len
        late = request.tokens[frame.base_len :] if 0 <= behind <= MAX_DEPTH else None
        tree = None if late is None else frame.tree.reroot(late)
        if tree is None or frame.base_len < attachment.base_len:
            self._metrics.stale_frames.inc()
            return
        attachment.base_len, attachment.tree = frame.base_len, tree
        attachment.speculator.breaker.succeeded()
        attachment.origin = Origin(time.monotonic(), frame.drafting_us)
        self._take_over(request, attachment)
        asked_at = attachment.asked_at
        if behind == 0 and asked_at is not None:
            if attachment.turn is Turn.DRAFT:
                attachment.speculator.pace.saw_latency(attachment.origin.came_at - asked_at)
            attachment.asked_at = None
            self.on_tree()
        elif len(tree):
            self._metrics.run_ahead_hits.inc()

    def _find(self, link: SpeculatorLink, handle: int) -> Attachment | None:
        for attachment in self._attachments.get(handle, ()):
            if attachment.speculator.link is link:
                return attachment
        return None

    def _drop(self, speculator: Speculator, request: Request) -> None:
        """Let a speculator draft the request no more; each may find another."""
        speculator.refused.add(request.handle)
        self._part(speculator, request)
        self._offer_room(speculator)

    def _put_off(self, speculator: Speculator, request: Request) -> None:
        """Let a speculator not draft the request until it has room; perhaps another has."""
        speculator.put_off.add(request.handle)
        self._part(speculator, request)

    def _remove(self, attachments: list[Attachment], speculator: Speculator) -> bool:
        """Take out a speculator's attachment; tells whether there was one."""
        gone = [a for a in attachments if a.speculator is speculator]
        attachments[:] = [a for a in attachments if a.speculator is not speculator]
        for attachment in gone:
            self._leave(attachment)
        return bool(gone)

    def _leave(self, attachment: Attachment) -> None:
        """It is over: so is a switch to it that has brought no tree."""
        if attachment.replaces is not None:
            self.policy.switched("abandoned")

    def _part(self, speculator: Speculator, request: Request) -> None:
        self._remove(self._attachments[request.handle], speculator)
        speculator.sessions.discard(request.handle)
        self._attach_free(request)
        self.on_tree()


def gain_of(attachment: Attachment, proposers: Sequence[int]) -> tuple[int, int]:
    """Accepted nodes that it proposed, up to the first gap, and those not reached without it."""
    own = ((1 << MAX_PROPOSERS) - 1) << (attachment.place * MAX_PROPOSERS)
    alone = itertools.takewhile(lambda bits: bits & own, proposers)
    without = itertools.takewhile(lambda bits: bits & ~own, proposers)
    return sum(1 for _ in alone), len(proposers) - sum(1 for _ in without)


def _offer(attachment: Attachment) -> Offer:
    """Its tree with calibrated confidence, its proposers' bits moved to its place."""
    tree, first_bit = attachment.tree, attachment.place * MAX_PROPOSERS
    calibrated = tree.copy()
    calibrated.confidence = attachment.calibration.apply(tree)
    calibrated.proposers = [bits << first_bit for bits in tree.proposers]
    calibrated.groups = [replace(g, proposers=g.proposers << first_bit) for g in tree.groups]
    return Offer(voter_names(attachment.speculator.link.peer), first_bit, calibrated)
