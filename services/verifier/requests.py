"""A request on its way through the verifier: waiting, prefilling, decoding, done."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from treecast.engine.base import KVSequence, SwappedKV
from treecast.sampling.laws import AcceptanceRule
from treecast.sampling.pick import Picker
from treecast.sampling.stops import StopRules
from treecast.telemetry.traces import UNTRACED, Span
from treecast.tree import MAX_DEPTH, TokenTree
from treecast.wire.frames import RouterFrame, ServingFrame, SessionKey, Start, Usage
from treecast.wire.link import Link

from .attachments import Attachment
from .schedule import State


@dataclass(slots=True, eq=False)
class Request:
    """One running request.

    The last of `tokens` is the root of the next tree: it is committed text whose KV is not yet
    computed. So `sequence.length < len(tokens)` always, and a request decodes, rather than
    prefills, when only the root is pending.

    Attributes:
        handle: our own number, shared with speculators; never reused.
        tokens: prompt and output committed so far.
        deadline: time.monotonic() at which the output is cut.
        retain: whether its session keeps the KV when it ends; not once the session was closed.
        sequence: its place in the KV pool; None while it waits, or is paused and was put out.
        swapped: its KV in host memory, while it is paused.
        admitted_at: time.monotonic() when it first began; 0 while it waits.
        began_step: the loop's number of the step with which it began, or went on.
        idle_since: since when it does not run; None while it does.
        idle_s: for how long it did not run before.
        drafted_by: who offered nodes to the running step; kept only if its rounds are reported.
        prefix_names: of its text's beginnings; None until they are needed.
        on_end: called once, when the request has ended.
    """

    handle: int
    start: Start
    link: Link[ServingFrame, RouterFrame]
    tokens: list[int]
    prompt_len: int
    law: AcceptanceRule
    picker: Picker
    stops: StopRules
    deadline: float | None
    sequence: KVSequence | None = None
    swapped: SwappedKV | None = None
    cached_tokens: int = 0
    prefix_names: Sequence[bytes] | None = None
    cancelled: bool = False
    handed_over: bool = False
    retain: bool = True
    arrived_at: float = field(default_factory=time.monotonic)
    admitted_at: float = 0.0
    began_step: int = 0
    idle_since: float | None = field(default_factory=time.monotonic)
    idle_s: float = 0.0
    last_commit_at: float | None = None
    span: Span = UNTRACED
    drafted_by: tuple[Attachment, ...] = ()
    tally: Tally = field(default_factory=lambda: Tally())
    on_end: Callable[[], None] = field(default=lambda: None)

    @property
    def pending(self) -> list[int]:
        """Committed text whose KV is not computed: what is left of the prompt, then the root."""
        assert self.sequence is not None
        return self.tokens[self.sequence.length :]

    @property
    def decoding(self) -> bool:
        return self.sequence is not None and self.sequence.length == len(self.tokens) - 1

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def tokens_left(self) -> int:
        return self.start.sampling.max_tokens - self.num_output

    @property
    def state(self) -> State:
        if self.idle_since is None:
            return State.RUNNING
        return State.PAUSED if self.admitted_at else State.WAITING

    @property
    def num_computed(self) -> int:
        """Positions whose KV there is, in the pool or outside."""
        held = self.sequence or self.swapped
        return 0 if held is None else held.length

    def go_on(self, step: int) -> None:
        """It begins, or goes on, with this step."""
        assert self.idle_since is not None
        now = time.monotonic()
        self.idle_s += now - self.idle_since
        self.idle_since, self.began_step = None, step
        self.admitted_at = self.admitted_at or now

    def pause(self) -> None:
        """It does not run from now on."""
        self.idle_since = time.monotonic()

    @property
    def expired(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def belongs_to(self, session: SessionKey | None) -> bool:
        """Whether it is a request of that session, under whatever lease."""
        return self.start.belongs_to(session)

    def usage(self) -> Usage:
        return self.tally.usage(self.prompt_len, self.cached_tokens, self.num_output)


@dataclass(slots=True)
class Roster:
    """All requests of a verifier, each in one of the lists.

    Attributes:
        waiting: in the order of arrival.
        running: best rank first.
        paused: best rank first; the last is the first whose KV is put out.
    """

    waiting: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    paused: list[Request] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running) + len(self.paused)

    def __iter__(self) -> Iterator[Request]:
        return itertools.chain(self.running, self.paused, self.waiting)

    @property
    def begun(self) -> list[Request]:
        """Those that may have KV."""
        return [*self.running, *self.paused]

    def remove(self, request: Request) -> None:
        """Take a request out of its list."""
        match request.state:
            case State.RUNNING:
                self.running.remove(request)
            case State.PAUSED:
                self.paused.remove(request)
            case State.WAITING:
                self.waiting.remove(request)


@dataclass(slots=True)
class Tally:
    """What a request's steps cost and gained."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_by_depth: list[int] = field(default_factory=lambda: [0] * MAX_DEPTH)
    offered_by_depth: list[int] = field(default_factory=lambda: [0] * MAX_DEPTH)

    def add(self, tree: TokenTree, num_accepted: int) -> None:
        """Count one verified tree."""
        self.steps += 1
        self.drafted += len(tree)
        self.accepted += num_accepted
        for depth in range(max(tree.depths, default=0)):
            self.offered_by_depth[depth] += 1
            self.accepted_by_depth[depth] += depth < num_accepted

    def usage(self, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> Usage:
        depths = sum(1 for offered in self.offered_by_depth if offered)
        return Usage(
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            output_tokens=output_tokens,
            steps=self.steps,
            drafted=self.drafted,
            accepted=self.accepted,
            accepted_by_depth=tuple(self.accepted_by_depth[:depths]),
            offered_by_depth=tuple(self.offered_by_depth[:depths]),
        )
