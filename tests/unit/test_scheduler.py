"""The scheduler over a real pool: any traffic, any pool, and every text comes out right."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treecast.bench.bare_loop import VOCAB, BareLoop
from treecast.bench.schedules import Foretold
from treecast.bench.schedules import serve as serve_all
from treecast.bench.schedules import traffic as arrivals
from treecast.engine.toy import toy_logits
from treecast.errors import Overloaded, PromptTooLong
from treecast.sampling.pick import Picker
from treecast.sampling.stops import FinishReason, Stop
from treecast.sampling.transforms import Context
from treecast.services.verifier.requests import Request
from treecast.services.verifier.room import KVRoom
from treecast.services.verifier.scheduler import Scheduler
from treecast.services.verifier.sessions import _common
from treecast.wire.frames import Completed, SessionKey

SYSTEM = [token % VOCAB for token in range(100)]


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


class Loop(BareLoop):
    """Each step is checked before its pass."""

    def send(self, traffic: Traffic) -> Request:
        prompt = [*(SYSTEM if traffic.system else ()), *traffic.prompt]
        name = traffic.session
        return self.submit(
            prompt,
            traffic.max_tokens,
            None if name is None else SessionKey("t", str(name), 1),
            tenant="t",
            expected_tokens=traffic.expected,
            priority=traffic.priority,
        )

    def step(self, number: int) -> None:
        self.arrange(number)
        self.check()
        self.compute()

    def check(self) -> None:
        usage, running = self.engine.usage, self.roster.running
        assert usage.free + usage.used == usage.total
        assert len(running) <= self.settings.max_running
        assert running or not len(self.roster), "requests are left, and nobody runs"
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
                submitted.append((traffic, loop.send(traffic)))
            except (Overloaded, PromptTooLong):
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
    max_examples=12,
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
        loop.send(traffic)
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
        loop.send(traffic)
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
        loop.send(traffic)
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


@pytest.mark.parametrize(
    "foretold",
    ["not", *(pytest.param(how, marks=pytest.mark.slow) for how in ("exactly", "roughly"))],
)
def test_requests_end_sooner_on_average_when_shorter_ones_go_first(foretold: Foretold) -> None:
    fcfs = serve_all(arrivals(1, 30, "not"), "fcfs")
    by_length = serve_all(arrivals(1, 30, foretold), "length")
    assert fmean(by_length.steps) < 0.9 * fmean(fcfs.steps)
    assert by_length.preemptions > 0 == fcfs.preemptions


def test_pages_that_are_there_go_before_more_of_a_sibling_that_is_paused_without_any() -> None:
    loop, session = Loop(64 * 32), SessionKey("t", "s", 1)
    text = [*SYSTEM, *SYSTEM]
    retained = loop.submit(text[:130], 1, SessionKey("t", "other", 1), tenant="t")
    for number in range(8):
        loop.step(number)
    assert not len(loop.roster)
    sibling = loop.submit(text, 60, session, tenant="t")
    while not sibling.num_output:
        loop.step(9)
    loop.scheduler.pause(sibling, "memory")
    while sibling.sequence is not None and loop.scheduler.room.put_out_last():
        pass
    assert sibling.sequence is None
    late = loop.submit([*text, 5], 1, session, tenant="t")
    source = loop.sessions._best_source(late, [sibling])
    assert source is not None
    assert (source.length, source.complete) == (128, True)
    assert source.holder is not sibling
    assert retained.tokens[:128] == late.tokens[:128]


@given(st.integers(0, 140), st.integers(1, 70), st.integers(1, 70), st.sampled_from(["t", ""]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_siblings_have_in_common_what_they_have_token_by_token(
    common: int, one_behind: int, other_behind: int, tenant: str
) -> None:
    loop, session = Loop(64 * 32), SessionKey("t", "s", 1)
    text = [token % VOCAB for token in range(common)]
    one = loop.submit([*text, *[1] * one_behind], 1, session, tenant=tenant)
    other = loop.submit([*text, *[2] * (other_behind - 1), 1], 1, session, tenant=tenant)
    assert loop.sessions._common(one, other) == _common(one.tokens, other.tokens[:-1])


def test_whole_pages_are_not_compared_when_siblings_are(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def counted(a: Sequence[int], b: Sequence[int]) -> int:
        compared.append(min(len(a), len(b)))
        return _common(a, b)

    monkeypatch.setattr("treecast.services.verifier.sessions._common", counted)
    loop, session = Loop(64 * 32), SessionKey("t", "s", 1)
    text = [token % VOCAB for token in range(1000)]
    siblings = [loop.submit(text, 5, session, tenant="t") for _ in range(4)]
    while len(loop.roster):
        loop.step(0)
    assert [sibling.cached_tokens for sibling in siblings] == [0, 999, 999, 999]
    assert compared
    assert max(compared) < 64


def test_a_slot_that_came_free_may_admit_at_once() -> None:
    """Nobody who waits is kept waiting for trees then."""
    loop = Loop(64 * 32, max_running=1)
    first, _ = (loop.send(traffic) for traffic in crowd(2, 40))
    loop.step(0)
    assert not loop.scheduler.may_admit
    first.cancelled = True
    loop.endings.reap(loop.engine.usage, 1)
    assert loop.scheduler.may_admit
