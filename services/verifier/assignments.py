"""Which speculators draft which requests: who is attached, moved, let go.

Everything here runs on the event loop and costs nothing when no speculator is there. Speculators'
refusals and silence can leave a request without drafts, never change a token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from treecast.sampling.params import Law
from treecast.wire.frames import Attach, Detach, Heartbeat
from treecast.wire.link import HEARTBEAT_S

from .attachments import Attachment, Speculator, SpeculatorLink, quickest
from .calibration import Calibration, PodCalibration
from .choice import TreePolicy
from .metrics.trees import TreeMetrics
from .pace import Turn
from .requests import Request


class Assignments:
    """All speculators, and all requests' attachments to them.

    Attributes:
        policy: who drafts a request, and what of the drafts is verified.
        on_tree: called when a tree that was asked for has come, or will not come.
        tokens_per_s: of each request, lately; what drafting time is worth. 0: nothing.
    """

    def __init__(
        self,
        policy: TreePolicy,
        max_nodes: int,
        trusted: Collection[str],
        metrics: TreeMetrics,
    ) -> None:
        """Begin without speculators.

        Args:
            policy: see the attribute.
            max_nodes: of one session's tree.
            trusted: addresses whose draws are believed, or "all"; only these serve the law mss.
            metrics: of trees; they get the sums of the calibration that is kept here.
        """
        self.policy = policy
        self.on_tree: Callable[[], None] = lambda: None
        self.tokens_per_s = 0.0
        self._max_nodes = max_nodes
        self._trusted = trusted
        self._metrics = metrics
        self._calibration = PodCalibration(metrics.proposer_label)
        metrics.watch(self._calibration.reliability)
        self._speculators: dict[int, Speculator] = {}
        self._requests: dict[int, Request] = {}
        self._attachments: dict[int, list[Attachment]] = {}

    @property
    def instances(self) -> list[str]:
        return sorted(s.link.peer.instance_id for s in self._speculators.values())

    def of(self, request: Request) -> list[Attachment]:
        """The request's attachments, oldest first; none once it has been released."""
        return self._attachments.get(request.handle, [])

    def drafting(self, request: Request) -> list[Attachment]:
        """The same without one that reads the text to take over from another."""
        attached = self.of(request)
        return [attachment for attachment in attached if attachment.replaces not in attached]

    def find(self, link: SpeculatorLink, handle: int) -> tuple[Request, Attachment] | None:
        """The request of that handle, if that speculator drafts it."""
        for attachment in self._attachments.get(handle, ()):
            if attachment.speculator.link is link:
                return self._requests[handle], attachment
        return None

    def budget(self, request: Request) -> int:
        """Nodes that a tree of the request's may have."""
        asked = request.start.speculation.max_nodes
        return self._max_nodes if asked is None else min(asked, self._max_nodes)

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
            speculator.put_off.pop(request.handle, None)
        self.policy.released(request)
        for attachment in attached:
            self._offer_room(attachment.speculator)

    # --- speculators come and go ------------------------------------------------------------

    def opened(self, link: SpeculatorLink) -> None:
        """A speculator is there: whoever lacks one may be drafted by it."""
        self._speculators[id(link)] = Speculator(link)
        self._metrics.speculators.set(len(self._speculators))
        for request in self._requests.values():
            self._attach_free(request)

    def closed(self, link: SpeculatorLink) -> None:
        """A speculator is gone: its requests find others, if there are any."""
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
        if speculator is None or not speculator.put_off or heartbeat.free_capacity == 0:
            return
        if time.monotonic() - speculator.offered_at > HEARTBEAT_S / 2:  # not at its every beat
            speculator.offered_at = time.monotonic()
            self._offer_room(speculator)

    def drop(self, request: Request, speculator: Speculator) -> None:
        """Let a speculator draft the request no more; each may find another."""
        speculator.refused.add(request.handle)
        self._part(request, speculator)
        self._offer_room(speculator)

    def put_off(self, request: Request, speculator: Speculator) -> None:
        """Let a speculator not draft the request until it has room; perhaps another has."""
        speculator.put_off[request.handle] = None
        self._part(request, speculator)

    def _part(self, request: Request, speculator: Speculator) -> None:
        self._remove(self._attachments[request.handle], speculator)
        speculator.sessions.discard(request.handle)
        self._attach_free(request)
        self.on_tree()

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

    # --- who is attached to whom ------------------------------------------------------------

    def _offer_room(self, speculator: Speculator) -> None:
        """It has room: let it be asked by whoever lacks one, and anew by one that was put off.

        By one of those at a time, since what it is short of may not be slots; in turn, since what
        one of them lacks another may not.
        """
        if speculator.put_off:
            del speculator.put_off[next(iter(speculator.put_off))]
        for request in self._requests.values():
            self._attach_free(request)

    def _attach_free(self, request: Request) -> None:
        attached = self._attachments[request.handle]
        while self.budget(request) > 0 and len(attached) < self.policy.per_session:
            taken = [attachment.speculator for attachment in attached]
            free = [
                each
                for each in self._speculators.values()
                if each not in taken and each.has_room and self._may_draft(each, request)
            ]
            if not free:
                return
            speculator = self.policy.choose(request, free, taken)
            quickest = min(taken + free, key=lambda each: each.pace.latency_s)
            pays = self._pays(speculator, first=speculator is quickest)
            self._attach(request, speculator, speculator.pace.first_turn(pays))

    def _pays(self, speculator: Speculator, *, first: bool) -> bool:
        """Whether to have a text read at once, going by other requests."""
        pace = speculator.pace
        price = pace.price(self.tokens_per_s)
        return not speculator.shares_cores or pace.gain.of(first=first) >= price

    def _attach(self, request: Request, speculator: Speculator, turn: Turn) -> Attachment:
        attached = self._attachments[request.handle]
        free = set(range(len(attached) + 1)) - {a.place for a in attached}
        calibration = Calibration(self._calibration, speculator.link.peer.proposers)
        attachment = Attachment(speculator, min(free), calibration)
        attached.append(attachment)
        speculator.sessions.add(request.handle)
        speculator.breaker.trying()
        self.sync(request, attachment, turn)
        return attachment

    def _may_draft(self, speculator: Speculator, request: Request) -> bool:
        """Under mss the output is only as right as the distributions that speculators report."""
        law, link = request.start.speculation.law, speculator.link
        trusted = "all" in self._trusted or link.address in self._trusted
        serves = law is Law.REPLAY or (trusted and law in link.peer.laws)
        turned_down = request.handle in speculator.refused or request.handle in speculator.put_off
        return serves and not turned_down

    def sync(self, request: Request, attachment: Attachment, turn: Turn) -> None:
        """Send a speculator the whole text, from which it goes on."""
        asked = turn is not Turn.SIT_OUT
        attachment.asked_at, attachment.turn = time.monotonic() if asked else None, turn
        attachment.reading, attachment.num_syncs = True, attachment.num_syncs + 1
        attachment.speculator.link.send(
            Attach(
                request.handle,
                tuple(request.tokens),
                request.prompt_len,
                request.start.sampling,
                request.start.noise_key,
                self.budget(request) if asked else 0,
                request.start.speculation,
                self.tokens_per_s,
                request.span.traceparent,
            ),
            waits=not asked,
        )

    def judge(self, tokens_per_s: float) -> None:
        """Once per step: say whose drafts are worth their time.

        Args:
            tokens_per_s: of all requests together.
        """
        gains: dict[Speculator, list[float]] = {}
        for handle, attachments in self._attachments.items():
            if self._requests[handle].decoding:
                first = quickest(attachments)
                for each in attachments:
                    gain = each.gain.of(first=each is first)
                    gains.setdefault(each.speculator, []).append(gain)
        for speculator, found in gains.items():
            speculator.judge(found, tokens_per_s)

    # --- switches ---------------------------------------------------------------------------

    def rearrange(self) -> None:
        """Once per step: let the policy move requests to other speculators."""
        wanting = {
            handle: attachments
            for handle, attachments in self._attachments.items()
            if self.budget(self._requests[handle]) > 0
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
                self.drop(request, late.speculator)
        elif speculator.has_room and self._may_draft(speculator, request):
            old = attached[0] if attached else None
            self._attach(request, speculator, Turn.CATCH_UP).replaces = old
            if old is not None:
                self.policy.switched("begun")

    def take_over(self, request: Request, attachment: Attachment) -> None:
        """A tree of it is there: if a switch waited for that, let the old one go."""
        attached, old = self._attachments[request.handle], attachment.replaces
        if old is None:
            return
        attachment.replaces = None
        self.policy.switched("done")
        if old in attached:  # it may have gone by itself
            attached.remove(old)
            old.speculator.sessions.discard(request.handle)
            old.speculator.link.send(Detach(request.handle))
            self._offer_room(old.speculator)
