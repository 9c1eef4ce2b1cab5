"""Grammars are compiled beside the event loop: through real ports, with the compiler held up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from treecast.engine.toy import ToyEngine
from treecast.errors import HandedOver, InvalidRequest, Overloaded
from treecast.sampling.compiler import GrammarCompiler
from treecast.sampling.grammar import Grammars, Matcher
from treecast.sampling.params import SamplingParams
from treecast.sampling.stops import FinishReason
from treecast.text.tokenizer import TokenizerFiles
from treecast.v1 import verifier_pb2 as pb
from treecast.v1 import verifier_pb2_grpc
from treecast.wire.channel import open_channel
from treecast.wire.frames import Attach, Forget, NeedSync, SessionKey

from ..byte_tokenizer import EOS, byte_tokenizer
from .test_speculator import attach, speculator_rig
from .verifier_rig import verifier_rig

VOCAB = 258
DEFINITION = byte_tokenizer().to_str().encode()
HELD = SamplingParams(temperature=0, max_tokens=16, regex="[a-f]{3}")
FOREVER = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
FREE = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


class Gate:
    """Holds up the real compiler's thread, and counts what it compiles."""

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        self.open.set()
        self.compiled: list[str] = []


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made, compile_ = Gate(), Grammars.matcher

    def held(self: Grammars, sampling: SamplingParams) -> Matcher:
        made.compiled.append(sampling.constraint[1])
        made.entered.set()
        assert made.open.wait(60)
        return compile_(self, sampling)

    monkeypatch.setattr(Grammars, "matcher", held)
    yield made
    made.open.set()


def compiler(**options: float) -> GrammarCompiler:
    return GrammarCompiler(Grammars(DEFINITION, [EOS], VOCAB), **options)  # type: ignore[arg-type]


def engine() -> ToyEngine:
    return ToyEngine(vocab_size=VOCAB, eos_token_ids=[EOS])


FILES = TokenizerFiles(DEFINITION)


async def entered(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.entered.wait, 60)


async def test_requests_go_on_while_a_grammar_is_compiled(gate: Gate) -> None:
    async with verifier_rig(engine(), FILES) as rig:
        gate.open.clear()
        _, held = rig.router.start([5, 6], HELD)
        await entered(gate)
        free = await rig.router.run([5, 6], FREE)
        assert len(free.tokens) == 16
        assert (held.tokens, held.error) == ([], None)
        gate.open.set()
        text = bytes((await held.end()).tokens[:-1])
        assert len(text) == 3
        assert set(text) <= set(b"abcdef")


async def test_a_request_can_be_cancelled_while_its_grammar_is_compiled(gate: Gate) -> None:
    async with verifier_rig(engine(), FILES) as rig:
        gate.open.clear()
        handle, held = rig.router.start([5, 6], HELD)
        await entered(gate)
        rig.router.cancel(handle)
        await held.end()
        assert held.completed is not None
        assert held.completed.finish is FinishReason.CANCELLED
        gate.open.set()
        assert (await rig.router.run([5, 6], HELD)).completed is not None
        assert held.tokens == []


async def test_a_deadline_goes_on_while_a_grammar_is_compiled(gate: Gate) -> None:
    async with verifier_rig(engine(), FILES) as rig:
        gate.open.clear()
        _, held = rig.router.start([5, 6], HELD, deadline_ms=1)
        await entered(gate)
        await asyncio.sleep(0.01)
        gate.open.set()
        error = (await held.end()).error
        assert error is not None
        assert error.message.startswith("deadline of 1 ms passed")


async def test_late_requests_are_handed_over_too_until_the_verifier_is_resumed(gate: Gate) -> None:
    """One whose grammar is compiled after the rest was handed over, and one on its way."""
    slow = ToyEngine(vocab_size=VOCAB, eos_token_ids=[EOS], step_s=0.01)
    async with verifier_rig(slow, FILES) as rig, open_channel(rig.address) as channel:
        stub = verifier_pb2_grpc.VerifierServiceStub(channel)
        gate.open.clear()
        _, running = rig.router.start([5, 6], FOREVER)
        _, held = rig.router.start([5, 6], HELD)
        await entered(gate)
        drained = await stub.Drain(pb.VerifierServiceDrainRequest(hand_over_after_ms=0))
        assert drained.running == 2
        assert isinstance((await running.end()).error, HandedOver)
        gate.open.set()
        assert isinstance((await held.end()).error, HandedOver)
        assert isinstance((await rig.router.run([5, 6], FREE)).error, HandedOver)
        await stub.Resume(pb.VerifierServiceResumeRequest())
        assert len((await rig.router.run([5, 6], FREE)).tokens) == 16


async def test_a_verifier_that_stops_waits_for_grammars_and_their_requests(gate: Gate) -> None:
    async with verifier_rig(engine(), FILES) as rig:
        gate.open.clear()
        _, held = rig.router.start([5, 6], HELD)
        await entered(gate)
        stopping = asyncio.create_task(rig.verifier.drain())
        assert not (await asyncio.wait([stopping], timeout=0.5))[0]
        gate.open.set()
        await stopping
        assert (await held.end()).completed is not None


async def test_nothing_is_retained_when_a_session_is_closed_while_a_grammar_is_compiled(
    gate: Gate,
) -> None:
    session = SessionKey("tenant", "s", 1)
    async with verifier_rig(engine(), FILES) as rig:
        gate.open.clear()
        _, held = rig.router.start([5, 6], HELD, session=session)
        await entered(gate)
        rig.router.link.send(Forget(session))
        await rig.router.run([5, 6], FREE)
        gate.open.set()
        assert (await held.end()).completed is not None
        await rig.idle()
        assert rig.engine.usage.used == 0
        await rig.router.run([5, 6], HELD, session=session)
        await rig.idle()
        assert rig.engine.usage.used == 1


async def test_requests_whose_grammars_are_compiled_count_among_those_that_wait(gate: Gate) -> None:
    async with verifier_rig(engine(), FILES, max_running=1, max_waiting=1) as rig:
        gate.open.clear()
        held = [rig.router.start([5, 6], HELD)[1] for _ in range(2)]
        error = (await rig.router.run([5, 6], HELD)).error
        assert isinstance(error, Overloaded)
        assert error.message == ("0 requests are running and 2 waiting; the limits are 1 and 1")
        assert rig.verifier._heartbeat().waiting == 2  # routers count them as load
        gate.open.set()
        for each in held:
            assert (await each.end()).completed is not None


async def test_a_grammar_that_is_not_compiled_in_time_is_refused_by_name(gate: Gate) -> None:
    async with verifier_rig(engine(), FILES, grammar_s=1) as rig:
        gate.open.clear()
        error = (await rig.router.run([5, 6], HELD)).error
        assert isinstance(error, InvalidRequest)
        assert error.message == "regex of 8 characters was not compiled in 1 s"
        assert len((await rig.router.run([5, 6], FREE)).tokens) == 16


async def test_earlier_output_is_followed_in_its_grammar_off_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads, accept = [], Matcher.accept

    def seen(self: Matcher, token: int) -> None:
        threads.append(threading.current_thread())
        accept(self, token)

    monkeypatch.setattr(Matcher, "accept", seen)
    async with verifier_rig(engine(), FILES) as rig:
        rig.router.offsets[1] = 2
        rest = (await rig.router.run([5, 6], HELD, committed=(97, 98))).tokens
    assert len(rest) == 2  # its last letter, and the end
    assert len(threads) >= 3
    assert threading.main_thread() not in threads


async def test_a_request_is_answered_when_the_preparing_of_it_breaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def breaking(self: Grammars, sampling: SamplingParams) -> Matcher:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Grammars, "matcher", breaking)
    async with verifier_rig(engine(), FILES) as rig:
        assert str((await rig.router.run([5, 6], HELD)).error) == "internal error"
        assert len((await rig.router.run([5, 6], FREE)).tokens) == 16


async def test_verifiers_tell_whether_they_keep_grammars() -> None:
    async with verifier_rig(engine(), FILES) as rig:
        assert rig.router.link.peer.keeps_grammars
    async with verifier_rig() as rig:  # without a tokenizer
        assert not rig.router.link.peer.keeps_grammars


async def test_a_grammar_is_compiled_once_for_all_who_ask(gate: Gate) -> None:
    one = compiler()
    gate.open.clear()
    waiting = [asyncio.create_task(one.matcher(HELD)) for _ in range(5)]
    await entered(gate)
    waiting[0].cancel()
    gate.open.set()
    found = (await asyncio.gather(*waiting, return_exceptions=True))[1:]
    assert gate.compiled == ["[a-f]{3}"]
    assert len({id(matcher) for matcher in found}) == 4
    first, second = found[:2]
    assert isinstance(first, Matcher)
    assert isinstance(second, Matcher)
    first.accept(ord("a"))
    first.accept(ord("b"))
    assert second.allowed(b"abc")[EOS]
    assert not second.allowed(b"ab")[EOS]  # it stands at its own beginning


async def test_a_grammar_that_nobody_waits_for_any_more_is_not_begun(gate: Gate) -> None:
    one = compiler()
    gate.open.clear()

    def ask(regex: str) -> asyncio.Task[Matcher | None]:
        return asyncio.create_task(one.matcher(SamplingParams(regex=regex)))

    begun, left, shared, shared_left = ask("a"), ask("b"), ask("c"), ask("c")
    await entered(gate)
    for each in (begun, left, shared_left):
        each.cancel()
    await asyncio.wait([begun, left, shared_left])
    again = ask("d")
    gate.open.set()
    assert await shared is not None
    assert await again is not None
    assert gate.compiled == ["a", "c", "d"]
    assert one.ready(SamplingParams(regex="a")) is not None
    assert await one.matcher(SamplingParams(regex="b")) is not None


async def test_a_grammar_may_be_asked_for_again_when_it_has_had_no_turn(gate: Gate) -> None:
    one = compiler(limit_s=1)
    gate.open.clear()
    first = asyncio.create_task(one.matcher(SamplingParams(regex="a")))
    await entered(gate)
    with pytest.raises(Overloaded, match=r"^regex of 1 characters had no turn to be compiled in 1"):
        await one.matcher(SamplingParams(regex="b"))
    with pytest.raises(InvalidRequest, match=r"^regex of 1 characters was not compiled in 1 s"):
        await first
    gate.open.set()
    assert await one.matcher(SamplingParams(regex="b")) is not None


async def test_no_more_are_kept_than_allowed_and_failures_not_at_all(gate: Gate) -> None:
    one = compiler(most_kept=2)
    for regex in ("a", "b", "c", "b", "c", "a"):
        await one.matcher(SamplingParams(regex=regex))
    assert gate.compiled == ["a", "b", "c", "a"]
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=r"^regex of 1 characters cannot be used"):
            await one.matcher(SamplingParams(regex="("))
    assert gate.compiled[4:] == ["(", "("]
    assert one.ready(SamplingParams(regex="a")) is not None
    assert one.ready(SamplingParams(regex="(")) is None


async def test_a_draft_is_masked_once_its_grammar_is_compiled(gate: Gate) -> None:
    grammars = Grammars(DEFINITION, [EOS], VOCAB)
    async with speculator_rig(engine(), grammars=grammars) as rig, rig.verifier(vocab=VOCAB) as v:
        gate.open.clear()
        asked: Attach = attach(1, 1, 2, sampling=HELD)
        v.send(asked)
        assert (await v.draft(1, base_len=2)).tokens[0] == 8  # the model's own: 3*2 + 1 + 1
        await entered(gate)
        gate.open.set()
        await v.hear(NeedSync, 1, lambda frame: True)
        v.recorder.frames.clear()
        v.send(asked)
        masked = await v.draft(1, base_len=2)
        assert set(masked.tokens) <= set(b"abcdef")
