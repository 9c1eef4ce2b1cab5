"""The speculator service through its real port, with a hand-computable draft model.

After a text that ends with a, b the toy favours 3b + a + 1 modulo 97, then the tokens above it.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from treecast.engine.base import Segment
from treecast.engine.toy import ToyEngine
from treecast.errors import ModelError, SettingsError
from treecast.sampling.grammar import Grammars
from treecast.sampling.params import Law, SamplingParams, SpeculationParams
from treecast.services.speculator.loading import check_tokenizers
from treecast.services.speculator.server import Speculator
from treecast.services.speculator.settings import SpeculatorSettings
from treecast.tree import ROOT, TokenTree
from treecast.v1 import speculator_pb2 as pb
from treecast.v1 import speculator_pb2_grpc
from treecast.wire.frames import (
    Attach,
    Commit,
    Detach,
    Draft,
    Hello,
    NeedSync,
    Refused,
    Role,
)
from treecast.wire.link import Link
from treecast.wire.server import Server

from .pair_rig import Recorder, raw_verifier, verifier

GREEDY = SamplingParams(temperature=0)
TIMEOUT_S = 10.0


def attach(handle: int, *tokens: int, budget: int = 16, **fields: Any) -> Attach:
    given: dict[str, Any] = {"prompt_len": len(tokens), "sampling": GREEDY, "noise_key": 0}
    return Attach(handle, tokens, node_budget=budget, **(given | fields))


def commit(handle: int, from_len: int, *tokens: int, budget: int = 16) -> Commit:
    return Commit(handle, from_len, tokens, budget)


class Verifier:
    """The verifier's end of the stream, and what it has heard."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    @property
    def link(self) -> Link[Any, Any]:
        return self.recorder.links[-1]

    def send(self, *frames: Any) -> None:
        for frame in frames:
            self.link.send(frame)

    async def hear(self, kind: Any, handle: int, where: Callable[[Any], bool] = bool) -> Any:
        """The first frame of a session that is of this kind and fits, once it has come."""

        def fitting() -> list[Any]:
            return [
                frame
                for frame in self.recorder.frames
                if isinstance(frame, kind) and frame.handle == handle and where(frame)
            ]

        await self.recorder.until(lambda: bool(fitting()))
        return fitting()[0]

    async def draft(self, handle: int, base_len: int) -> TokenTree:
        frame: Draft = await self.hear(Draft, handle, lambda f: f.base_len == base_len)
        return frame.tree

    def heard(self, handle: int) -> list[type]:
        return [type(frame) for frame in self.recorder.frames if frame.handle == handle]


class Rig:
    """A speculator on a real port."""

    def __init__(self, speculator: Speculator, engine: ToyEngine, address: str) -> None:
        self.speculator = speculator
        self.engine = engine
        self.address = address

    @asynccontextmanager
    async def verifier(self, name: str = "verifier-1", vocab: int = 97) -> AsyncIterator[Verifier]:
        hello = Hello(name, Role.VERIFIER, vocab_size=vocab)
        async with verifier(self.address, hello) as (_, recorder):
            await recorder.heard("opened")
            yield Verifier(recorder)

    def metric(self, name: str, **labels: str) -> float:
        return value(self.speculator.metrics.registry, name, **labels)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for something that has no event of its own."""
        async with asyncio.timeout(TIMEOUT_S):
            while not holds():
                await asyncio.sleep(0.005)


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(f"treecast_speculator_{name}", labels) or 0.0


@asynccontextmanager
async def speculator_rig(
    engine: ToyEngine | None = None, grammars: Grammars | None = None, **fields: Any
) -> AsyncIterator[Rig]:
    engine = engine or ToyEngine()
    settings = SpeculatorSettings(engine="toy", **({"growth": "<2,1>"} | fields))
    speculator = Speculator(
        settings,
        [engine for spec in settings.specs if spec.kind == "ssm"],
        "spec-1",
        ThreadPoolExecutor(1),
        grammars,
    )
    engine.num_passes = engine.num_rows = 0  # without those that were timed at start
    server = Server()
    server.add(
        speculator_pb2_grpc.add_SpeculatorServiceServicer_to_server,
        speculator,
        "treecast.v1.SpeculatorService",
    )
    address = await server.listen("127.0.0.1:0")
    speculator.start()
    try:
        yield Rig(speculator, engine, address)
    finally:
        speculator.close()
        await server.stop(0)


# --- trees ----------------------------------------------------------------------------------------


async def test_tree_comes_when_attached() -> None:
    async with speculator_rig() as rig, rig.verifier() as v:
        v.send(attach(1, 1, 2))
        tree = await v.draft(1, base_len=2)
        # 3*2+1+1 = 8, then 9; below 8: 27; below 9: 30.
        assert (tree.tokens, tree.parents) == ([8, 9, 27, 30], [ROOT, ROOT, 0, 1])
        assert v.link.peer.proposers == ("ssm",)
        assert (v.link.peer.vocab_size, v.link.peer.capacity) == (97, 32)


async def test_tree_is_rerooted_when_commit_was_foreseen() -> None:
    async with speculator_rig() as rig, rig.verifier() as v:
        v.send(attach(1, 1, 2))
        await v.draft(1, base_len=2)
        v.send(commit(1, 2, 8))
        tree = await v.draft(1, base_len=3)
        assert (tree.tokens, tree.parents) == ([27, 28, 90, 93], [ROOT, ROOT, 0, 1])
        assert rig.engine.num_rows == 4 + 2  # 8 was not computed again


async def test_tree_starts_anew_when_commit_was_not_foreseen() -> None:
    async with speculator_rig() as rig, rig.verifier() as v:
        v.send(attach(1, 1, 2))
        await v.draft(1, base_len=2)
        v.send(commit(1, 2, 60, 70))
        tree = await v.draft(1, base_len=4)
        # 3*70+60+1 = 271 = 77; below 77: 3*77+70+1 = 302 = 11; below 78: 14.
        assert (tree.tokens, tree.parents) == ([77, 78, 11, 14], [ROOT, ROOT, 0, 1])


async def test_every_session_gets_its_own_tree_when_many_draft_at_once() -> None:
    async with speculator_rig(growth="<1,1>") as rig, rig.verifier() as v:
        v.send(*(attach(handle, handle, 0) for handle in range(1, 20)))
        for handle in range(1, 20):
            tree = await v.draft(handle, base_len=2)
            assert tree.tokens == [handle + 1, 3 * (handle + 1) + 1]
        assert rig.engine.num_passes < 19, "sessions are drafted one by one"


async def test_commits_meanwhile_are_applied_together_when_a_draft_is_slow() -> None:
    started, entered, go_on = threading.Event(), threading.Event(), threading.Event()

    def hold(segments: Sequence[Segment]) -> None:
        if started.is_set():
            entered.set()
            assert go_on.wait(TIMEOUT_S)

    engine = ToyEngine(on_forward=hold)
    async with speculator_rig(engine, growth="<1>") as rig, rig.verifier() as v:
        started.set()
        v.send(attach(1, 1, 2))
        await rig.until(entered.is_set)
        v.send(commit(1, 2, 8), commit(1, 3, 27), Detach(99))
        await rig.until(lambda: rig.metric("unknown_frames_total") == 1)  # so they have arrived
        go_on.set()
        assert (await v.draft(1, base_len=4)).tokens == [90]
        # The tree for the superseded base is sent as well: the verifier can re-root it.
        assert (await v.draft(1, base_len=2)).tokens == [8]
        assert v.heard(1) == [Draft, Draft]


async def test_lookup_drafts_alone_when_asked() -> None:
    async with speculator_rig(drafters="ngram") as rig, rig.verifier(vocab=12345) as v:
        v.send(attach(1, 11, 500, 12000, 11, 500, budget=3))
        assert (await v.draft(1, base_len=5)).tokens == [12000, 11, 500]
        assert (v.link.peer.vocab_size, v.link.peer.proposers) == (0, ("ngram",))
        v.send(commit(1, 5, 7))
        assert len(await v.draft(1, base_len=6)) == 0  # "no guess" is said, not left unsaid


async def test_trees_are_merged_when_there_are_two_drafters() -> None:
    async with speculator_rig(drafters="ssm,ngram") as rig, rig.verifier() as v:
        v.send(attach(1, 1, 2, 50, 1, 2))
        tree = await v.draft(1, base_len=5)
        assert v.link.peer.proposers == ("ssm", "ngram")
        top = [node for node, depth in enumerate(tree.depths) if depth == 1]
        by_token = {tree.tokens[node]: tree.proposers[node] for node in top}
        assert by_token == {8: 0b01, 9: 0b01, 50: 0b10}


# --- budgets --------------------------------------------------------------------------------------


async def test_growth_pauses_when_budget_is_zero() -> None:
    async with speculator_rig() as rig, rig.verifier() as v:
        v.send(attach(1, 1, 2, budget=0), attach(2, 1, 2))
        await v.draft(2, base_len=2)
        v.send(commit(1, 2, 5, budget=0), commit(2, 2, 5))
        await v.draft(2, base_len=3)
        assert v.heard(1) == []
        v.send(commit(1, 3, 6))
        # 3*6+5+1 = 24.
        assert (await v.draft(1, base_len=4)).tokens[0] == 24


async def test_tree_keeps_to_the_budget_when_granted_less() -> None:
    async with speculator_rig() as rig, rig.verifier() as v:
        v.send(attach(1, 1, 2, budget=1))
        assert (await v.draft(1, base_len=2)).tokens == [8]
        v.send(commit(1, 2, 8, budget=3))
        assert len(await v.draft(1, base_len=3)) == 3


# --- sync and capacity ----------------------------------------------------------------------------


async def test_sync_is_asked_for_when_commits_have_a_gap() -> None:
    async with speculator_rig() as rig, rig.verifier() as v:
        v.send(attach(1, 1, 2))
        await v.draft(1, base_len=2)
        v.send(commit(1, 3, 5))
        await v.hear(NeedSync, 1)
        v.send(commit(1, 4, 6), Detach(99))
        await rig.until(lambda: rig.metric("unknown_frames_total") == 1)
        assert v.heard(1) == [Draft, NeedSync]  # asked for once
        v.send(attach(1, 1, 2, 4, 5, 6))
        # 3*6+5+1 = 24.
        assert (await v.draft(1, base_len=5)).tokens[0] == 24
        assert rig.metric("resyncs_total") == 1
        v.send(commit(1, 5, 24))
        assert (await v.draft(1, base_len=6)).tokens[0] == (3 * 24 + 6 + 1) % 97


async def test_attach_is_refused_when_over_capacity_and_taken_when_one_detaches() -> None:
    async with speculator_rig(capacity=1) as rig, rig.verifier() as v:
        v.send(attach(1, 1, 2), attach(2, 1, 2))
        refusal = await v.hear(Refused, 2)
        assert refusal.why == "stream has 1 sessions; the limit is 1"
        assert refusal.no_room
        await v.draft(1, base_len=2)
        v.send(Detach(1), attach(3, 1, 2))
        await v.draft(3, base_len=2)
        assert rig.metric("refused_total", reason="OVERLOADED") == 1


async def test_each_verifier_has_its_own_capacity_when_there_are_two() -> None:
    rig_of_two = speculator_rig(capacity=1, max_sessions=2)
    async with rig_of_two as rig, rig.verifier("a") as a, rig.verifier("b") as b:
        a.send(attach(1, 1, 2))
        b.send(attach(1, 5, 6))
        assert (await a.draft(1, base_len=2)).tokens[0] == 8
        assert (await b.draft(1, base_len=2)).tokens[0] == 24
        async with rig.verifier("c") as c:
            c.send(attach(1, 1, 2))
            refusal = await c.hear(Refused, 1)
            assert refusal.why == "speculator has 2 sessions; the limit is 2"


async def test_attach_is_refused_when_the_pool_is_full() -> None:
    engine = ToyEngine(pool_tokens=1024)  # room for one session of 2 + 256 tokens and 256 rows
    async with speculator_rig(engine) as rig, rig.verifier() as v:
        v.send(attach(1, 1, 2), attach(2, 1, 2))
        assert "free" in (await v.hear(Refused, 2)).why
        v.send(commit(1, 2, 8))
        assert (await v.draft(1, base_len=3)).tokens[0] == 27


# --- hostile or dying verifiers -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (commit(1, 2, 97), "token 0 of commit is 97; the vocabulary has 97"),
        (attach(1, 1, 2, 97), "token 2 of attach is 97; the vocabulary has 97"),
        (attach(1, 1, 2, prompt_len=3), "attach has prompt_len 3; allowed: 1..2, its tokens"),
        (attach(1), "attach has prompt_len 0; allowed: 1..0, its tokens"),
        (
            attach(1, 1, 2, speculation=SpeculationParams.of(Law.MSS, growth="best-first")),
            "growth under law mss is 'best-first'; allowed: widths by level such as <3,2,1,1>",
        ),
    ],
)
async def test_only_its_session_ends_when_a_frame_is_bad(frame: Any, why: str) -> None:
    async with speculator_rig() as rig, rig.verifier() as v:
        v.send(attach(1, 1, 2), attach(2, 1, 2))
        await v.draft(1, base_len=2)
        await v.draft(2, base_len=2)
        v.send(frame, commit(2, 2, 8))
        assert (await v.hear(Refused, 1)).why == why
        assert (await v.draft(2, base_len=3)).tokens[0] == 27
        assert rig.metric("sessions") == 1
        assert v.link.alive


async def test_stream_goes_on_when_frames_mean_nothing() -> None:
    async with speculator_rig() as rig, raw_verifier(rig.address) as raw:
        await raw.say(Hello("raw", Role.VERIFIER, vocab_size=97))
        bad_law = pb.VerifierFrame(
            attach=pb.Attach(handle=7, tokens=[1], prompt_len=1, law=9)  # type: ignore[arg-type]
        )
        await raw.write(pb.SpeculateRequest(frames=[pb.VerifierFrame(), bad_law]))
        await raw.say(commit(5, 2, 8), Detach(5), attach(8, 1, 2))
        frames: dict[int, Any] = {}
        async with asyncio.timeout(TIMEOUT_S):
            while 8 not in frames:
                frames |= {f.handle: f for f in await raw.hear() if hasattr(f, "handle")}
        assert frames[7] == Refused(7, "law is 9; known: 1 (replay), 2 (mss)")
        assert frames[8].tree.tokens == [8, 9, 27, 30]
        assert frames.keys() == {7, 8}
        assert rig.metric("unknown_frames_total") == 2


async def test_text_beyond_the_drafts_context_is_refused_when_attached() -> None:
    async with speculator_rig(ToyEngine(context_tokens=4)) as rig, rig.verifier() as v:
        v.send(attach(1, 1, 2, 3, 4, 5))
        assert (await v.hear(Refused, 1)).why == "text has 5 tokens; the draft's limit is 4"
        assert rig.metric("refused_total", reason="PROMPT_TOO_LONG") == 1


async def test_sessions_of_the_pass_are_refused_when_the_engine_fails() -> None:
    def fail(segments: Sequence[Segment]) -> None:
        if any(13 in segment.tokens for segment in segments):
            raise RuntimeError("the model broke down")

    async with speculator_rig(ToyEngine(on_forward=fail)) as rig, rig.verifier() as v:
        v.send(attach(1, 1, 13))
        assert (await v.hear(Refused, 1)).why == "drafting failed"
        v.send(attach(2, 1, 2))
        await v.draft(2, base_len=2)
        v.send(Detach(2))
        await rig.until(lambda: rig.engine.usage.used == 0)


async def test_one_session_is_lost_when_the_batch_fails_over_it() -> None:
    batches: list[int] = []

    def fail(segments: Sequence[Segment]) -> None:
        batches.append(len(segments))
        if any(13 in segment.tokens for segment in segments):
            raise RuntimeError("the model broke down")

    async with speculator_rig(ToyEngine(on_forward=fail)) as rig, rig.verifier() as v:
        batches.clear()
        v.send(attach(1, 1, 2), attach(2, 1, 13), attach(3, 1, 4))
        assert (await v.hear(Refused, 2)).why == "drafting failed"
        # They were one batch, and it was the middle one that broke it.
        assert batches[0] == 3
        assert (await v.draft(1, base_len=2)).tokens[:2] == [8, 9]
        assert (await v.draft(3, base_len=2)).tokens[:2] == [14, 15]
        v.send(commit(1, 2, 8), commit(3, 2, 14))
        assert (await v.draft(1, base_len=3)).tokens[0] == 27
        assert (await v.draft(3, base_len=3)).tokens[0] == 47
        assert Refused not in v.heard(1) + v.heard(3)
        assert (await v.draft(3, base_len=3)).tokens[0] == 47


async def test_two_models_draft_for_one_session_when_both_are_asked_for() -> None:
    fields = {"drafters": "ssm,ssm,suffix", "draft_threads": "each"}
    async with speculator_rig(**fields) as rig, rig.verifier() as v:
        assert v.link.peer.proposers == ("ssm-0", "ssm-1", "suffix")
        v.send(attach(1, 1, 2, 50, 1, 2))
        tree = await v.draft(1, base_len=5)
        top = [node for node, depth in enumerate(tree.depths) if depth == 1]
        by_token = {tree.tokens[node]: tree.proposers[node] for node in top}
        assert by_token == {8: 0b011, 9: 0b011, 50: 0b100}


async def test_everything_is_freed_when_the_stream_dies() -> None:
    async with speculator_rig(drafters="ssm,ngram") as rig:
        async with rig.verifier() as v:
            v.send(*(attach(handle, handle, 0) for handle in range(1, 6)))
            await v.draft(5, base_len=2)
            assert rig.metric("sessions") == 5
        await rig.until(lambda: len(rig.speculator.sessions) == 0)
        await rig.until(lambda: rig.engine.usage.used == 0)
        assert rig.metric("sessions") == 0


async def test_verifier_is_refused_when_its_vocabulary_differs() -> None:
    async with speculator_rig() as rig:
        hello = Hello("other", Role.VERIFIER, vocab_size=50)
        async with raw_verifier(rig.address) as raw:
            await raw.say(hello)
            error = await raw.end()
        assert error.message == "vocab_size of peer 'other' is 50; expected 97"


# --- run-ahead ------------------------------------------------------------------------------------


async def test_thread_sleeps_between_commits_when_cores_are_shared() -> None:
    async with speculator_rig(growth="best-first") as rig, rig.verifier() as v:
        v.send(attach(1, 1, 2, budget=2))
        await v.draft(1, base_len=2)
        rows = rig.engine.num_rows
        v.send(attach(2, 1, 2, budget=0), Detach(99))
        await rig.until(lambda: rig.metric("unknown_frames_total") == 1)
        assert rig.engine.num_rows == rows
        assert rig.metric("run_ahead_total", outcome="miss") == 0


async def test_bonus_is_foreseen_when_it_runs_ahead() -> None:
    fields: dict[str, Any] = {"growth": "best-first", "shares_cores": False, "ahead_nodes": 40}
    async with speculator_rig(**fields) as rig, rig.verifier() as v:
        v.send(attach(1, 1, 2, budget=1))
        assert (await v.draft(1, base_len=2)).tokens == [8]
        await rig.until(lambda: not rig.speculator.grower.busy)
        v.send(commit(1, 2, 8, 28, budget=1))  # 28 is the second best below 8, and was not offered
        assert (await v.draft(1, base_len=4)).tokens == [(3 * 28 + 8 + 1) % 97]
        assert rig.metric("run_ahead_total", outcome="hit") == 1
        v.send(commit(1, 4, 60))
        await v.draft(1, base_len=5)
        assert rig.metric("run_ahead_total", outcome="miss") == 1


# --- the process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_process_announces_serves_and_ends_when_signalled(number: int) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "treecast.services.speculator"),
        *("--drafter", "ssm", "--drafter", "ngram", "--engine", "toy", "--announce"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    async with asyncio.timeout(60):
        line = json.loads(await process.stdout.readline())
        assert line["role"] == "speculator"
        page = await asyncio.to_thread(read, f"http://{line['metrics']}/metrics")
        assert "treecast_speculator_draft_seconds" in page
        async with grpc.aio.insecure_channel(line["address"]) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service="treecast.v1.SpeculatorService")
            answer = await stub.Check(request)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        hello = Hello("verifier-1", Role.VERIFIER, vocab_size=97)
        async with verifier(line["address"], hello) as (_, recorder):
            await recorder.heard("opened")
            recorder.links[-1].send(attach(1, 31, 42))
            await recorder.heard("received Draft 1")
            recorder.links[-1].send(Detach(1))
            process.send_signal(number)
            await recorder.heard("closed")
        assert await process.wait() == 0
        log = (await process.stderr.read()).decode()
    assert "service.stopped" in log
    assert "42" not in [word for record in log.splitlines() for word in record.split()]


def read(url: str) -> str:
    with urlopen(url, timeout=TIMEOUT_S) as page:
        return str(page.read().decode())


async def test_new_sessions_are_refused_when_draining() -> None:
    async with speculator_rig(drain_s=TIMEOUT_S) as rig, rig.verifier() as v:
        v.send(attach(1, 1, 2))
        await v.draft(1, base_len=2)
        draining = asyncio.create_task(rig.speculator.drain())
        await rig.until(lambda: rig.speculator.sessions.draining)
        v.send(attach(2, 1, 2), commit(1, 2, 8))
        assert (await v.hear(Refused, 2)).why == "speculator is draining"
        await v.draft(1, base_len=3)  # what runs goes on
        v.send(Detach(1))
        await draining
        await v.recorder.heard("closed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--growth", "<2,0>"],
            "--growth (or TREECAST_GROWTH) is '<2,0>': "
            "Value error, expansion width is 0; the least is 1",
        ),
        (
            ["--drafters", "ssm,magic"],
            "--drafters (or TREECAST_DRAFTERS) is 'magic': Value error, "
            "drafter is 'magic'; it must be one of ssm, ngram, suffix",
        ),
        (
            ["--drafters", "ngram=folder"],
            "--drafters (or TREECAST_DRAFTERS) is 'ngram=folder': Value error, "
            "a model's folder is given as ssm=FOLDER",
        ),
        (
            ["--growth", "dp:999"],
            "--growth (or TREECAST_GROWTH) is 'dp:999': "
            "Value error, dp plans 999 nodes; allowed: 1..256",
        ),
    ],
)
def test_start_is_refused_when_a_setting_is_bad(arguments: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        SpeculatorSettings.load(arguments, "treecast-speculator")
    assert str(refused.value) == message


def test_drafters_are_numbered_when_several_are_of_one_kind() -> None:
    arguments = ["--drafters", "ssm=one,ngram", "--drafters", "ssm,suffix"]
    specs = SpeculatorSettings.load(arguments, "treecast-speculator").specs
    assert [(spec.name, spec.model) for spec in specs] == [
        ("ssm-0", "one"),
        ("ngram", ""),
        ("ssm-1", ""),
        ("suffix", ""),
    ]


def test_models_are_refused_when_their_tokenizers_differ() -> None:
    info = ToyEngine().info
    check_tokenizers(["ssm-0", "ssm-1"], [info, info])
    other = replace(info, tokenizer_hash="other")
    with pytest.raises(ModelError, match="draft model ssm-1 has tokenizer 'other'; that of ssm-0"):
        check_tokenizers(["ssm-0", "ssm-1"], [info, other])


def test_torch_stays_unloaded_when_only_lookup_drafts() -> None:
    code = (
        "import sys; from concurrent.futures import ThreadPoolExecutor; "
        "from treecast.services.speculator.server import Speculator; "
        "from treecast.services.speculator.settings import SpeculatorSettings; "
        "Speculator(SpeculatorSettings(drafters='ngram,suffix'), [], 'x', ThreadPoolExecutor(1)); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
