"""The scheduler over a real pool: any traffic, any pool, and every text comes out right."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treecast.engine.curve import StepCurve
from treecast.engine.toy import ToyEngine, toy_logits
from treecast.errors import Overloaded
from treecast.sampling.laws import acceptance_rule, walk
from treecast.sampling.params import Law, SamplingParams
from treecast.sampling.pick import Picker
from treecast.sampling.stops import FinishReason, Stop, StopRules
from treecast.sampling.transforms import Context
from treecast.services.verifier.choice import TreePolicy
from treecast.services.verifier.choice.metrics import ChoiceMetrics
from treecast.services.verifier.endings import Endings
from treecast.services.verifier.metrics import VerifierMetrics
from treecast.services.verifier.pace import Goodput
from treecast.services.verifier.plan import plan
from treecast.services.verifier.requests import Request
from treecast.services.verifier.room import KVRoom
from treecast.services.verifier.scheduler import Scheduler
from treecast.services.verifier.sessions import SessionStore
from treecast.services.verifier.settings import VerifierSettings
from treecast.services.verifier.spans import RequestSpans
from treecast.services.verifier.speculation import Speculation
from treecast.telemetry.traces import open_tracing
from treecast.tree import TokenTree
from treecast.wire.frames import Completed, SessionKey, Start

VOCAB = 97
SYSTEM = [token % VOCAB for token in range(100)]


@dataclass
class Router:
    """The other end of a request's stream."""

    sent: list[object] = field(default_factory=list)

    def send(self, frame: object) -> None:
        self.sent.append(frame)


@dataclass(frozen=True)
class Traffic:
    """One request: when it comes, what it shares with others, how long it is said to be."""

    at: int
    system: bool
    prompt: tuple[int, ...]
    max_tokens: int
    expected: int | None
    priority: int
    session: int | None
    cancel_after: int | None


class Loop:
    """A step loop without wire and threads."""

    def __init__(self, pool_tokens: int, **given: Any) -> None:
        self.engine = ToyEngine(vocab_size=VOCAB, pool_tokens=pool_tokens)
        self.settings = VerifierSettings(engine="toy", **given)
        self.metrics = VerifierMetrics()
        policy = TreePolicy(ChoiceMetrics(self.metrics.registry), 0)
        speculation = Speculation(policy, self.settings.max_nodes, (), self.metrics)
        spans = RequestSpans(open_tracing(None, "verifier", "test"))
        self.sessions = SessionStore(self.engine, 600, self.metrics.evicted)
        self.curve = StepCurve({1: 0.001, 2: 0.002})
        self.scheduler = Scheduler(
            self.engine,
            self.settings,
            self.sessions,
            speculation,
            self.curve,
            Goodput(1000.0),
            self.metrics,
            spans,
        )
        self.roster = self.scheduler.roster
        self.endings = Endings(
            self.roster, self.sessions, self.scheduler.swap, speculation, self.metrics, spans
        )
        self.handles = itertools.count(1)
        self.router = Router()
        self.ran: Counter[int] = Counter()

    def submit(self, traffic: Traffic) -> Request:
        prompt = [*(SYSTEM if traffic.system else ()), *traffic.prompt]
        sampling = SamplingParams(temperature=0, max_tokens=traffic.max_tokens)
        handle = next(self.handles)
        session = None if traffic.session is None else SessionKey("t", str(traffic.session), 1)
        start = Start(
            handle,
            str(handle),
            prompt=tuple(prompt),
            sampling=sampling,
            noise_key=0,
            tenant="t",
            session=session,
            expected_tokens=traffic.expected,
            priority=traffic.priority,
        )
        request = Request(
            handle=handle,
            start=start,
            link=self.router,  # type: ignore[arg-type]
            tokens=list(prompt),
            prompt_len=len(prompt),
            law=acceptance_rule(Law.REPLAY),
            picker=Picker(sampling, 0, Context(prompt)),
            stops=StopRules(frozenset(), sampling, None),
            deadline=None,
        )
        self.scheduler.submit(request)
        return request

    def step(self, number: int) -> None:
        self.endings.reap(self.engine.usage, self.settings.max_running)
        self.scheduler.arrange(number)
        self.check()
        running = self.roster.running
        assert running or not len(self.roster), "requests are left, and nobody runs"
        trees = [TokenTree() for _ in running]
        batch = plan(running, trees, self.curve, self.settings.max_rows, 0.0)
        if not batch:
            return
        for work, rows in zip(
            batch, self.engine.forward([work.segment() for work in batch]), strict=True
        ):
            request = work.request
            self.ran[request.handle] += 1
            assert request.sequence is not None
            walked = None
            if work.samples:
                walked = walk(work.tree, rows, request.picker, request.stops.check, request.law)
            self.engine.commit(request.sequence, work.path(walked.accepted if walked else ()))
            if walked is not None:
                request.tokens.extend(walked.tokens)
                if walked.stop is not None:
                    self.endings.finish(request, walked.stop)

    def check(self) -> None:
        usage, running = self.engine.usage, self.roster.running
        assert usage.free + usage.used == usage.total
        assert len(running) <= self.settings.max_running
        assert self.scheduler.swap.used_bytes <= self.settings.swap_gib * 2**30
        assert len(self.engine.storage.saved) == sum(
            request.swapped is not None for request in self.roster
        )
        for request in running:
            assert request.sequence is not None
            assert request.sequence.capacity >= len(request.tokens), "no room for its next token"


def plain(request: Request) -> list[int]:
    tokens = list(request.start.prompt)
    picker = Picker(request.start.sampling, 0, Context(tokens))
    for _ in range(request.num_output):
        tokens.append(picker.pick(toy_logits(tokens, VOCAB)))
        picker.accept(tokens[-1])
    return tokens


TRAFFIC = st.lists(
    st.builds(
        Traffic,
        st.integers(0, 60),
        st.booleans(),
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=70).map(tuple),
        st.integers(1, 90),
        st.one_of(st.none(), st.integers(1, 120)),
        st.sampled_from([0, 0, 0, 3, -3]),
        st.one_of(st.none(), st.integers(1, 3)),
        st.one_of(st.none(), st.none(), st.integers(1, 40)),
    ),
    min_size=1,
    max_size=10,
)


def serve(loop: Loop, given_traffic: Sequence[Traffic]) -> list[Request]:
    """Step until all have ended, and see that each ended right."""
    coming = sorted(given_traffic, key=lambda traffic: traffic.at)
    submitted: list[tuple[Traffic, Request]] = []
    refused = 0
    for number in itertools.count():
        while coming and coming[0].at <= number:
            traffic = coming.pop(0)
            try:
                submitted.append((traffic, loop.submit(traffic)))
            except Overloaded:
                refused += 1
        for traffic, request in submitted:
            if traffic.cancel_after is not None and loop.ran[request.handle] > traffic.cancel_after:
                request.cancelled = True
        loop.step(number)
        if not coming and not len(loop.roster):
            break
        assert number < 5000, "it does not come to an end"
    ends = [frame for frame in loop.router.sent if isinstance(frame, Completed)]
    assert len(ends) == len(submitted) == len(given_traffic) - refused
    for _, request in submitted:
        assert request.tokens == plain(request)
    return [request for _, request in submitted]


@given(
    TRAFFIC,
    st.integers(4, 9),
    st.integers(1, 5),
    st.sampled_from(["fcfs", "length"]),
    st.sampled_from([0, 1000, 2**30]),
    st.sampled_from([1e-9, 30.0]),
)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_every_text_is_right_and_nothing_is_left_whatever_comes(
    traffic: list[Traffic], pages: int, slots: int, schedule: str, swap_bytes: int, aging_s: float
) -> None:
    loop = Loop(
        64 * pages,
        max_running=slots,
        schedule=schedule,
        swap_gib=swap_bytes / 2**30,
        max_rows=48,
        aging_s=aging_s,
    )
    serve(loop, traffic)
    for session in range(1, 4):
        loop.sessions.forget(SessionKey("t", str(session), 1))
    assert loop.engine.usage.used == 0
    assert loop.scheduler.swap.used_bytes == 0
    assert not loop.engine.storage.saved


def crowd(count: int, max_tokens: int) -> list[Traffic]:
    return [Traffic(0, False, (k, 1), max_tokens, None, 0, None, None) for k in range(count)]


def paused(loop: Loop, why: str) -> float:
    name = "treecast_verifier_preemptions_total"
    return loop.metrics.registry.get_sample_value(name, {"why": why}) or 0.0


def test_the_youngest_is_paused_when_memory_runs_out_and_goes_on_first() -> None:
    loop = Loop(64 * 8, max_rows=48)
    requests = serve(loop, crowd(4, 240))
    assert paused(loop, "memory") > 0
    assert paused(loop, "length") == 0
    ends = [frame.handle for frame in loop.router.sent if isinstance(frame, Completed)]
    assert ends == [request.handle for request in requests]


def test_nobody_is_paused_when_the_pool_holds_all() -> None:
    loop = Loop(64 * 32, max_rows=48)
    serve(loop, crowd(4, 240))
    assert paused(loop, "memory") == 0


def test_more_run_at_once_than_reservations_to_the_end_would_allow() -> None:
    """Each needs 4 pages in the end, 2 to begin: of 8 pages, 2 could be reserved for."""
    loop = Loop(64 * 8, max_rows=48)
    for traffic in crowd(4, 240):
        loop.submit(traffic)
    loop.step(0)
    assert len(loop.roster.running) == 3


def test_a_step_without_room_is_seen_when_nobody_makes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The negative control of the check that each who runs has room for its next token."""
    monkeypatch.setattr(KVRoom, "give_ahead", lambda self, request: None)
    serve(Loop(64 * 8, max_rows=48), crowd(2, 240))
    monkeypatch.setattr(Scheduler, "_keep", lambda self, running: None)
    with pytest.raises(AssertionError, match="no room for its next token"):
        serve(Loop(64 * 8, max_rows=48), crowd(2, 240))


def test_a_cancelled_request_gives_back_its_swapped_kv() -> None:
    loop = Loop(64 * 8, max_rows=48)
    for traffic in crowd(4, 240):
        loop.submit(traffic)
    number = 0
    while not any(request.swapped for request in loop.roster.paused):
        loop.step(number)
        number += 1
    assert loop.scheduler.swap.used_bytes > 0
    for request in loop.roster:
        request.cancelled = True
    loop.step(number)
    assert (loop.scheduler.swap.used_bytes, loop.engine.usage.used) == (0, 0)
    reasons = [frame.finish for frame in loop.router.sent if isinstance(frame, Completed)]
    assert reasons == [FinishReason.CANCELLED] * 4


def test_endings_leave_nothing_when_a_broken_request_was_paused() -> None:
    """A step fails only those in it: the paused one goes on."""
    loop = Loop(64 * 8, max_rows=48)
    for traffic in crowd(4, 240):
        loop.submit(traffic)
    number = 0
    while not loop.roster.paused:
        loop.step(number)
        number += 1
    away = loop.roster.paused[0]
    loop.endings.fail(list(loop.roster.running), RuntimeError("device lost"))
    while len(loop.roster):
        loop.step(number)
        number += 1
    assert away.tokens == plain(away)
    assert loop.engine.usage.used == 0
    assert isinstance(loop.router.sent[-1], Completed)
    assert Stop(FinishReason.LENGTH).reason is loop.router.sent[-1].finish
