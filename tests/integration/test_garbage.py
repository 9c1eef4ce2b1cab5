"""Bytes that are no messages, on every kind of stream: refused, and no fault of ours in the log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from treecast.bench.chaos import corpus
from treecast.bench.chaos.faults import Amounts
from treecast.bench.chaos.fuzz import Fuzzer, serving
from treecast.sampling.params import SamplingParams
from treecast.services.local.valkey import free_port
from treecast.wire import codec
from treecast.wire.channel import open_channel
from treecast.wire.frames import Heartbeat, Role

from .verifier_rig import VOCAB, plain, verifier_rig

GREEDY = SamplingParams(temperature=0, max_tokens=24)
PROMPT = [5, 6, 7]
GARBAGE = b"\xff\xff\xff"


def errors(logs: list[Any]) -> list[Any]:
    return [entry for entry in logs if entry["log_level"] in ("error", "critical")]


async def read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def greeting(role: Role) -> bytes:
    hello = corpus.hello(role, "garbage", vocab_size=VOCAB)
    encode = codec.encode_router_frames if role is Role.ROUTER else codec.encode_speculator_frames
    return encode([hello, Heartbeat()]).SerializeToString()


@pytest.mark.parametrize("greeted", [True, False])
async def test_garbage_ends_a_stream_by_name_when_it_comes_from_a_caller(greeted: bool) -> None:
    with capture_logs() as logs:
        async with verifier_rig() as rig, open_channel(rig.address) as channel:
            call: Any = channel.stream_stream(corpus.SERVE.path)()
            for body in [greeting(Role.ROUTER)] * greeted + [GARBAGE]:
                await call.write(body)
            with pytest.raises(grpc.aio.AioRpcError, match="a message cannot be parsed") as caught:
                await read_all(call)
            assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert not errors(logs)


@pytest.mark.parametrize("greeted", [True, False])
async def test_garbage_costs_no_token_when_it_comes_from_a_speculator(greeted: bool) -> None:
    asked = asyncio.Event()

    async def speculate(requests: Any, context: Any) -> AsyncIterator[bytes]:
        if greeted:
            yield greeting(Role.SPECULATOR)
        asked.set()
        yield GARBAGE

    address = f"127.0.0.1:{free_port()}"
    with capture_logs() as logs:
        async with (
            serving(address, corpus.SPECULATE.path, speculate),
            verifier_rig(speculators=(address,)) as rig,
        ):
            await asyncio.wait_for(asked.wait(), 10)
            outcome = await rig.router.run(PROMPT, GREEDY)
    assert outcome.tokens == plain(PROMPT, GREEDY)
    assert not errors(logs)


async def test_reflection_refuses_garbage_without_a_fault_in_the_log() -> None:
    with capture_logs() as logs:
        async with verifier_rig() as rig, open_channel(rig.address) as channel:
            call: Any = channel.stream_stream(corpus.REFLECTION)()
            await call.write(GARBAGE)
            with pytest.raises(grpc.aio.AioRpcError, match="cannot be parsed"):
                await call.read()
    assert not errors(logs)


async def test_fuzzed_frames_do_no_harm_when_a_request_runs_beside_them() -> None:
    fuzzer = Fuzzer(Amounts(seed=5))
    with capture_logs() as logs:
        async with verifier_rig(max_waiting=1000, session_ttl_s=0.1) as rig:
            feeding = asyncio.create_task(
                fuzzer.pair(rig.address, corpus.SERVE, Role.ROUTER, 2000, vocab_size=VOCAB)
            )
            while not feeding.done():
                outcome = await rig.router.run(PROMPT, GREEDY)
                assert outcome.tokens == plain(PROMPT, GREEDY)
            await feeding
            async with asyncio.timeout(60):
                while rig.engine.usage.used:  # frames on their way, sessions until they expire
                    await asyncio.sleep(0.05)
    assert fuzzer.sent[corpus.SERVE.path] >= 2000
    assert not errors(logs)
