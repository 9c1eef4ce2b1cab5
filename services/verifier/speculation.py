"""What speculators have sent, and what the step makes of it.

Everything here runs on the event loop and costs nothing when no speculator is attached. Frames
from speculators are input: they can waste a step's rows, never change a token; but under the law
mss, where they are believed, so that only trusted speculators draft.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import structlog

from treecast.sampling.laws import Walk
from treecast.tree import MAX_DEPTH, MAX_PROPOSERS, TokenTree
from treecast.wire.frames import (
    BadFrame,
    Commit,
    Detach,
    Draft,
    Heartbeat,
    NeedSync,
    Refused,
    SpeculatorFrame,
)

from .assignments import Assignments
from .attachments import MOST_SYNCS, Attachment, Origin, Owed, SpeculatorLink, quickest
from .choice import Offer
from .choice.vote import voter_names
from .metrics.trees import TreeMetrics
from .pace import Turn
from .plan import Work
from .requests import Request

log = structlog.get_logger()


class Speculation:
    """All requests' trees. A `PairHandler` for the speculators' streams."""

    def __init__(self, assignments: Assignments, metrics: TreeMetrics) -> None:
        """`assignments` say whose trees they are; they hear of every speculator from here."""
        self._assignments = assignments
        self._metrics = metrics

    # --- the step asks and tells --------------------------------------------------------------

    def tree(self, request: Request, room: int) -> TokenTree:
        """What the request's speculators have guessed, at most `room` nodes of it.

        Confidence is calibrated.
        """
        budget = min(self._assignments.budget(request), request.tokens_left - 1, room)
        attachments = self._assignments.of(request)
        for attachment in attachments:
            attachment.offered, attachment.offered_origin = attachment.tree, attachment.origin
            attachment.answered = (
                budget > 0 and attachment.asked_at is None and attachment.turn is Turn.DRAFT
            )
        offering = [attachment for attachment in attachments if attachment.tree.tokens]
        if request.start.report_rounds:
            request.drafted_by = tuple(offering)
        offers = [_offer(attachment) for attachment in offering]
        if not offers or budget <= 0:
            return TokenTree()
        depth = min(MAX_DEPTH, request.tokens_left - 1)
        return self._assignments.policy.combine(request, offers, budget, depth)

    def proposers(self, request: Request, bits: int) -> set[str]:
        """Names of those that proposed a node of the request's merged tree."""
        return {
            name
            for attachment in self._assignments.of(request)
            for k, name in enumerate(attachment.speculator.link.peer.proposers)
            if bits >> (attachment.place * MAX_PROPOSERS + k) & 1
        }

    def owed(self, requests: Iterable[Request], *, reading: bool) -> list[Owed]:
        """What speculators owe decoding requests for the text committed last.

        Args:
            reading: also of those that have more text to read before.
        """
        found = (Owed.of(drafting, reading=reading) for drafting in self._of_use(requests))
        return [owed for owed in found if owed is not None]

    def waited_in_vain(self, requests: Iterable[Request], waited_s: float) -> None:
        """Trees that were waited for did not come: their speculators are slower than that, and
        asking them brought the step nothing.
        """
        for attachment in itertools.chain.from_iterable(self._of_use(requests)):
            if attachment.owes():
                attachment.speculator.pace.saw_latency(2 * waited_s)
                attachment.saw_gain(0.0, 0.0)

    def _of_use(self, requests: Iterable[Request]) -> Iterator[list[Attachment]]:
        """Who drafts, by request that can use a tree in the next step."""
        for request in requests:
            if request.decoding and request.tokens_left > 1:
                yield self._assignments.drafting(request)

    def committed(self, work: Work, walked: Walk) -> None:
        """Tokens were committed: learn, re-root, tell the speculators."""
        request, tokens = work.request, walked.tokens
        attachments = self._assignments.of(request)
        for attachment in attachments:
            attachment.calibration.learn(attachment.offered, tokens)
            if attachment.answered:
                attachment.saw_gain(*gain_of(attachment, work, walked.accepted))
        self._assignments.policy.committed(request, attachments, tokens)
        self._choose_turns(attachments)
        for attachment in attachments:
            attachment.tree = attachment.tree.reroot(tokens) or TokenTree()
            asked = attachment.turn is not Turn.SIT_OUT and request.tokens_left > 1
            attachment.num_syncs = 0
            attachment.asked_at = time.monotonic() if asked else None
            attachment.speculator.link.send(
                Commit(
                    request.handle,
                    len(request.tokens) - len(tokens),
                    tuple(tokens),
                    self._assignments.budget(request) if asked else 0,
                    self._assignments.tokens_per_s,
                ),
                waits=not asked,
            )

    def _choose_turns(self, attachments: Sequence[Attachment]) -> None:
        """Who drafts on our cores sits out the steps that it would delay for too little.

        The quickest is judged by all that its trees hold, the others by what they add.
        """
        first = quickest(attachments)
        for attachment in attachments:
            attachment.take_turn(attachment.pays(first=attachment is first))

    # --- PairHandler: frames from speculators ---------------------------------------------------

    def opened(self, link: SpeculatorLink) -> None:
        self._assignments.opened(link)

    def closed(self, link: SpeculatorLink) -> None:
        self._assignments.closed(link)

    def beat(self, link: SpeculatorLink, heartbeat: Heartbeat) -> None:
        self._assignments.beat(link, heartbeat)

    def failed_frame(self, link: SpeculatorLink, error: BadFrame) -> None:
        """A bad frame ends its own session's speculation there, nothing else."""
        self._metrics.bad_frames.inc()
        if (found := self._assignments.find(link, error.handle)) is not None:
            self._at_fault(*found)

    def _at_fault(self, request: Request, attachment: Attachment) -> None:
        attachment.speculator.link.send(Detach(request.handle))
        attachment.speculator.breaker.failed()
        self._assignments.drop(request, attachment.speculator)

    def received(self, link: SpeculatorLink, frame: SpeculatorFrame) -> None:
        self._metrics.received.inc(isinstance(frame, Draft))
        found = self._assignments.find(link, frame.handle)
        if found is None:
            self._metrics.stale_frames.inc()
            return
        request, attachment = found
        match frame:
            case Draft():
                self._draft(request, attachment, frame)
            case NeedSync() if attachment.num_syncs < MOST_SYNCS:
                sits_out = attachment.turn is Turn.SIT_OUT
                turn = Turn.SIT_OUT if sits_out else Turn.CATCH_UP
                self._assignments.sync(request, attachment, turn)
            case NeedSync():
                self._at_fault(request, attachment)
            case Refused():
                log.info("speculator.refused", peer=link.peer.instance_id, why=frame.why)
                link.send(Detach(frame.handle))  # it may have taken the session since
                if frame.no_room:
                    self._assignments.put_off(request, attachment.speculator)
                else:
                    self._assignments.drop(request, attachment.speculator)

    def _draft(self, request: Request, attachment: Attachment, frame: Draft) -> None:
        request.law.check(frame.tree)  # what it raises comes back through `failed_frame`
        self._metrics.nodes_offered.inc(len(frame.tree))
        attachment.num_syncs = 0
        attachment.reading = attachment.turn is Turn.SIT_OUT  # else it has read up to a late tree
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
        self._assignments.take_over(request, attachment)
        asked_at = attachment.asked_at
        if behind == 0 and asked_at is not None:
            if attachment.turn is Turn.DRAFT:
                attachment.speculator.pace.saw_latency(attachment.origin.came_at - asked_at)
            attachment.asked_at = None
            self._assignments.on_tree()
        elif len(tree):
            self._metrics.run_ahead_hits.inc()


def gain_of(attachment: Attachment, work: Work, accepted: Sequence[int]) -> tuple[float, float]:
    """Accepted nodes that it proposed, up to the first gap, and those not reached without it.

    Less what its nodes, and those that nobody else proposed, took of the step's time, in tokens.
    """
    own = ((1 << MAX_PROPOSERS) - 1) << (attachment.place * MAX_PROPOSERS)
    nodes = work.tree.proposers
    path = [nodes[node] for node in accepted]
    alone = sum(1 for _ in itertools.takewhile(lambda bits: bits & own, path))
    without = sum(1 for _ in itertools.takewhile(lambda bits: bits & ~own, path))
    node_price = work.tree_price / max(1, len(nodes))
    mine = sum(1 for bits in nodes if bits & own)
    only_mine = sum(1 for bits in nodes if not bits & ~own)
    return alone - node_price * mine, len(path) - without - node_price * only_mine


def _offer(attachment: Attachment) -> Offer:
    """Its tree with calibrated confidence, its proposers' bits moved to its place."""
    tree, first_bit = attachment.tree, attachment.place * MAX_PROPOSERS
    calibrated = tree.copy()
    calibrated.confidence = attachment.calibration.apply(tree)
    calibrated.proposers = [bits << first_bit for bits in tree.proposers]
    calibrated.groups = [replace(g, proposers=g.proposers << first_bit) for g in tree.groups]
    return Offer(voter_names(attachment.speculator.link.peer), first_bit, calibrated)
