"""Who drafts what: one speculator as a verifier knows it, and its work for one request."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from treecast.tree import TokenTree
from treecast.wire.breaker import Breaker
from treecast.wire.frames import SpeculatorFrame, VerifierFrame
from treecast.wire.link import Link

from .calibration import Calibration
from .pace import DECAY_OF_ONE, Gain, Pace, Turn

BREAKER_THRESHOLD = 5
BREAKER_PAUSE_S = 2.0

SpeculatorLink = Link[VerifierFrame, SpeculatorFrame]

_PROBE_EVERY = 8
"""Commits between trees that are asked for only so that their worth stays known."""
_RAREST_PROBE = 64
"""The same, of a speculator that goes on being worth too little."""
MOST_SYNCS = 4
"""Times that a text is sent again before it has grown or brought a tree; who asks for more is at
fault.
"""
_RETURN = 1.15
"""Who sits out comes back once its trees are worth so many times their price: at the border itself
it would come and go, and have text to catch up with each time."""
_LEAST_SHARE = 0.5
"""A request whose trees bring less than so much of its share of the price costs drafts more time
than they gain by it."""


@dataclass(slots=True, eq=False)
class Speculator:
    """One speculator that a stream is open to.

    Attributes:
        refused: requests that it will not draft, whatever comes.
        put_off: requests that it had no room for, in the order in which they were turned away.
        breaker: open while it only breaks the sessions that it is given.
        offered_at: when those that were put off were last offered to it.
        least_gain: what a request's trees must bring for it to be asked; infinity: of nobody.
    """

    link: SpeculatorLink
    pace: Pace = field(default_factory=Pace)
    sessions: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    put_off: dict[int, None] = field(default_factory=dict)
    breaker: Breaker = field(default_factory=lambda: Breaker(BREAKER_THRESHOLD, BREAKER_PAUSE_S))
    offered_at: float = -math.inf
    least_gain: float = 0.0

    @property
    def willing(self) -> bool:
        return self.link.alive and not self.link.last_heartbeat.draining

    @property
    def has_room(self) -> bool:
        """Whether another session may be attached, as far as is known here."""
        return self.willing and self.free_capacity > 0 and self.breaker.allows

    @property
    def shares_cores(self) -> bool:
        """Whether drafting there and verifying here slow each other down."""
        return self.link.peer.shares_cores

    def judge(self, gains: Sequence[float], tokens_per_s: float) -> None:
        """Whether its drafts are worth their time. All requests wait for them, so that those it
        drafts pay for all together.

        Args:
            gains: tokens a step that its trees bring each request that decodes.
            tokens_per_s: of all requests together.
        """
        if not gains:
            return
        price = self.pace.price(tokens_per_s)
        least = _LEAST_SHARE * price / len(gains)
        tokens = sum(gain for gain in gains if gain >= least)
        asked = _RETURN * price if math.isinf(self.least_gain) else price
        self.least_gain = least if tokens >= asked else math.inf

    @property
    def free_capacity(self) -> int:
        return self.link.peer.capacity - len(self.sessions)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a tree comes from: when it came, and how long drafting it took (0: not told)."""

    came_at: float = 0.0
    drafting_us: int = 0


@dataclass(slots=True, eq=False)
class Attachment:
    """One speculator's work for one request.

    Attributes:
        place: which of the request's speculators it is; says where its proposers' bits lie.
        tree: its newest tree, re-rooted to the committed text; empty when it missed.
        offered: that tree as it was when the running step was planned.
        answered: whether it was grown for the text as it was then, not re-rooted from an older one.
        asked_at: when the tree was asked for that has not come; None if nothing is owed.
        gain: for this request; begins as that for all.
        turn: what was asked for last.
        reading: whether there is text, of its beginning or of turns that it sat out, after which
            no tree has come yet.
        num_syncs: times that the text was sent since it grew or a tree came.
        num_sat_out: commits in a row that asked for nothing.
        probe_every: commits that it sits out at a time while it does not pay.
        base_len: committed length that the newest tree hung off when it came.
        origin: when that tree came, and what it took.
        offered_origin: the same of `offered`.
        replaces: whom it takes over from once its first tree is there; it is not waited for.
    """

    speculator: Speculator
    place: int
    calibration: Calibration
    tree: TokenTree = field(default_factory=TokenTree)
    offered: TokenTree = field(default_factory=TokenTree)
    answered: bool = False
    asked_at: float | None = None
    gain: Gain = field(init=False)
    turn: Turn = Turn.CATCH_UP
    reading: bool = True
    num_syncs: int = 0
    num_sat_out: int = 0
    probe_every: int = _PROBE_EVERY
    base_len: int = -1
    origin: Origin = Origin()
    offered_origin: Origin = Origin()
    replaces: Attachment | None = None

    def __post_init__(self) -> None:
        self.gain = replace(self.speculator.pace.gain)

    def owes(self, *, reading: bool = False) -> bool:
        """Whether a tree is owed: one of its turns, or also one after text that it has to read."""
        return self.asked_at is not None and (reading or self.turn is Turn.DRAFT)

    def saw_gain(self, alone: float, added: float) -> None:
        """What its tree brought in a step."""
        self.gain.saw(alone, added, DECAY_OF_ONE)
        self.speculator.pace.gain.saw(alone, added)

    def pays(self, *, first: bool) -> bool:
        """Whether to ask it for a tree; see `Speculator.judge`."""
        speculator = self.speculator
        return not speculator.shares_cores or self.gain.of(first=first) >= speculator.least_gain

    def take_turn(self, pays: bool) -> None:
        """Choose what to ask for, if its trees pay or not.

        Text comes first, however many commits it takes to be read. Who does not pay has two turns
        now and then, one to catch up and one to be measured; all requests together as often as one.
        """
        self.turn = self._next_turn(pays)
        self.reading = self.reading or self.turn is Turn.SIT_OUT

    def _next_turn(self, pays: bool) -> Turn:
        if self.turn is Turn.CATCH_UP and self.reading:
            return Turn.CATCH_UP
        if pays:
            self.num_sat_out, self.probe_every = 0, _PROBE_EVERY
            return Turn.CATCH_UP if self.reading else Turn.DRAFT
        if self.turn is Turn.CATCH_UP:
            self.num_sat_out, self.probe_every = 0, min(2 * self.probe_every, _RAREST_PROBE)
            return Turn.DRAFT
        self.num_sat_out += 1
        probe_every = self.probe_every * max(1, len(self.speculator.sessions))
        return Turn.SIT_OUT if self.num_sat_out < probe_every else Turn.CATCH_UP


def quickest(attachments: Iterable[Attachment]) -> Attachment | None:
    """Of a request's, the one whose trees are there first."""
    return min(attachments, key=lambda each: each.speculator.pace.latency_s, default=None)


@dataclass(frozen=True, slots=True)
class Owed:
    """Trees that one request's speculators have not sent yet.

    Attributes:
        gain_tokens: accepted tokens per step that they would add to what is at hand.
        latency_s: time from commit to the last of them, as seen lately.
        shares_cores: they are being made on the cores that the step runs on.
    """

    gain_tokens: float
    latency_s: float
    shares_cores: bool

    @classmethod
    def of(cls, attachments: Sequence[Attachment], *, reading: bool) -> Owed | None:
        """Of those that were asked for a tree alone, or also of those that read text first."""
        owing = [a for a in attachments if a.owes(reading=reading)]
        if not owing:
            return None
        added = sorted(a.gain.added for a in owing)
        gain = sum(added)
        if not any(attachment.tree.tokens for attachment in attachments):
            gain = max(a.gain.alone for a in owing) + sum(added[:-1])
        beside = any(a.speculator.shares_cores for a in owing)
        return cls(gain, max(a.speculator.pace.latency_s for a in owing), beside)
