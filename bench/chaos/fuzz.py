"""Garbage on every RPC but Drain, Resume and Reload, and on the HTTP edge, while a load runs."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import httpx2
from google.protobuf.message import Message

from treecast.wire import codec
from treecast.wire.channel import open_channel
from treecast.wire.frames import Heartbeat, Hello, Role

from . import corpus
from .corpus import PairCorpus, Rpc
from .faults import Amounts, Fault
from .lies import SPECULATOR_LIE, VERIFIER_LIE, Lie
from .mesh import ChaosMesh
from .mutate import Mutator

FRAMES_PER_MESSAGE = 64
_CALL_S = 2.0
_FEWEST_PER_S = 20
"""Frames that a peer takes from a hostile worker even on a machine with other work."""

_JSON = {"content-type": "application/json"}
_GARBAGE = 0.02
"""Share of messages on pair streams whose bytes are mutated: most end the stream."""

_INSTANCES = itertools.count(1)
_WRITE_S = 5.0

_ENDED = (grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError, TimeoutError)
"""What a write to a stream that the server has ended comes to."""


class Fuzzer:
    """Sends a number of frames, divided among all ways in.

    Attributes:
        sent: frames and requests by target.
        answers: gRPC codes that calls and streams ended with.
    """

    def __init__(self, amounts: Amounts) -> None:
        self.sent: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self._amounts = amounts
        self._mutator = Mutator(amounts.seed)

    @property
    def fault(self) -> Fault:
        frames = f"{self._amounts.num_frames:,} fuzzed frames"
        return Fault(f"{frames} on every RPC but Drain, Resume, Reload", self.run)

    async def run(self, mesh: ChaosMesh) -> None:
        """All ways in at once."""
        total = self._amounts.num_frames
        verifier, speculator = mesh.processes["verifier-1"], mesh.processes[mesh.speculators[1]]
        router = mesh.processes["router-1"]
        async with asyncio.TaskGroup() as group:
            for address, rpcs in (
                (router.address, corpus.ROUTER),
                (verifier.address, corpus.VERIFIER),
                (speculator.address, corpus.SPECULATOR),
            ):
                group.create_task(self._calls(address, rpcs, total // 100))
                group.create_task(self._reflect(address, total // 1000))
            if router.http_address is not None:
                group.create_task(self.edge(router.http_address, total // 100))
            group.create_task(self.pair(verifier.address, corpus.SERVE, Role.ROUTER, total // 2))
            group.create_task(
                self.pair(speculator.address, corpus.SPECULATE, Role.VERIFIER, total * 35 // 100)
            )
            speculator_lies, verifier_lies = total * 9 // 100, total * 3 // 100
            group.create_task(
                self._pose(SPECULATOR_LIE, mesh.strangers["speculator"], speculator_lies)
            )
            asking = [group.create_task(self._ask_liar(router.address)) for _ in range(8)]
            await self._pose(VERIFIER_LIE, mesh.strangers["verifier"], verifier_lies)
            for task in asking:
                task.cancel()

    def _damaged(self, message: Message) -> bytes:
        if self._mutator.random.random() < 0.4:
            return self._mutator.mutate_bytes(message.SerializeToString())
        return self._mutator.mutate_fields(message).SerializeToString()

    # --- unary and server-streaming ---------------------------------------------------------------

    async def _calls(self, address: str, rpcs: Sequence[Rpc], count: int) -> None:
        async with open_channel(address) as channel:
            numbers = iter(range(count))
            await asyncio.gather(*(self._call_on(channel, rpcs, numbers) for _ in range(8)))

    async def _call_on(
        self, channel: grpc.aio.Channel, rpcs: Sequence[Rpc], numbers: Iterator[int]
    ) -> None:
        for number in numbers:
            rpc = rpcs[number % len(rpcs)]
            body = self._damaged(self._mutator.random.choice(rpc.requests))
            self.sent[rpc.path] += 1
            try:
                async with asyncio.timeout(_CALL_S):
                    await _ask(channel, rpc, body)
            except TimeoutError:
                self.answers["left running"] += 1
            except grpc.aio.AioRpcError as error:
                self._note(error)
            else:
                self.answers["OK"] += 1

    def _note(self, error: grpc.aio.AioRpcError) -> None:
        """Our own "internal error" is apart: it is a bug, whatever came in."""
        ours = error.details() == "internal error"
        self.answers["INTERNAL, ours" if ours else error.code().name] += 1

    async def _reflect(self, address: str, count: int) -> None:
        async with open_channel(address) as channel:
            for _ in range(count):
                call: Any = channel.stream_stream(corpus.REFLECTION)(timeout=_CALL_S)
                self.sent[corpus.REFLECTION] += 1
                try:
                    await call.write(self._damaged(corpus.REFLECTED))
                    await call.done_writing()
                    await call.read()
                except grpc.aio.AioRpcError as error:
                    self._note(error)
                except grpc.aio.InternalError:
                    self.answers["ended before all was written"] += 1
                finally:
                    call.cancel()

    # --- the HTTP edge ----------------------------------------------------------------------------

    async def edge(self, address: str, count: int) -> None:
        """Requests to the OpenAI-compatible API."""
        numbers = iter(range(count))
        async with httpx2.AsyncClient(base_url=f"http://{address}", timeout=_CALL_S) as client:
            await asyncio.gather(*(self._post_on(client, numbers) for _ in range(8)))

    async def _post_on(self, client: httpx2.AsyncClient, numbers: Iterator[int]) -> None:
        for number in numbers:
            path, valid = corpus.EDGE[number % len(corpus.EDGE)]
            body = json.dumps(self._mutator.mutate_json(valid)).encode()
            if self._mutator.random.random() < 0.4:
                body = self._mutator.mutate_bytes(body)
            self.sent[path] += 1
            try:
                answer = await client.post(path, content=body, headers=_JSON)
            except httpx2.TimeoutException:
                self.answers["left running"] += 1
            except httpx2.HTTPError as error:
                self.answers[type(error).__name__] += 1
            else:
                self.answers[f"HTTP {answer.status_code}"] += 1

    # --- pair streams -----------------------------------------------------------------------------

    async def pair(
        self,
        address: str,
        pair: PairCorpus,
        role: Role,
        count: int,
        vocab_size: int = corpus.VOCAB,
    ) -> None:
        """Pose as a router or a verifier until so many frames are sent, on as many streams as it
        takes.
        """
        async with open_channel(address) as channel:
            while self.sent[pair.path] < count:
                call: Any = channel.stream_stream(pair.path)()
                hello = corpus.hello(role, f"fuzz-{next(_INSTANCES)}", vocab_size)
                reading = asyncio.create_task(_drain(call))
                try:
                    async with asyncio.timeout(60):
                        await self._write_frames(call, pair, hello, count)
                except _ENDED:
                    pass
                finally:
                    call.cancel()
                    reading.cancel()
                    await asyncio.gather(reading, return_exceptions=True)
                    self.answers[f"{role.name.lower()} streams"] += 1

    async def _write_frames(self, call: Any, pair: PairCorpus, ours: Hello, count: int) -> None:
        encode = (
            codec.encode_router_frames if ours.role is Role.ROUTER else codec.encode_verifier_frames
        )
        await call.write(encode([ours, Heartbeat()]).SerializeToString())
        while self.sent[pair.path] < count:
            body, num_frames = self._pair_message(pair)
            self.sent[pair.path] += num_frames
            async with asyncio.timeout(_WRITE_S):
                await call.write(body)

    def _pair_message(self, pair: PairCorpus) -> tuple[bytes, int]:
        chosen = self._mutator.random.choices(pair.frames, k=FRAMES_PER_MESSAGE)
        frames = [self._mutator.mutate_fields(frame) for frame in chosen]
        message: Any = pair.message(frames=[*frames, *pair.last])
        body = message.SerializeToString()
        if self._mutator.random.random() < _GARBAGE:
            body = self._mutator.mutate_bytes(body)
        return body, len(frames)

    # --- workers that lie -------------------------------------------------------------------------

    async def _pose(self, lie: Lie, address: str, count: int) -> None:
        """Serve as a worker, and answer with damaged frames about what was really asked."""
        done = asyncio.Event()
        name = f"hostile {lie.hello.role.name.lower()}"

        async def behave(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            asked: dict[int, int] = {}
            reading = asyncio.create_task(_learn(requests, lie, asked))
            try:
                ours = replace(lie.hello, instance_id=f"fuzz-{next(_INSTANCES)}")
                yield lie.greet(ours)
                while self.sent[name] < count:
                    body, num_frames = self._lies(lie, asked)
                    self.sent[name] += num_frames
                    yield body
                    await asyncio.sleep(0.002)
            finally:
                reading.cancel()
            done.set()

        async with serving(address, lie.path, behave):
            async with asyncio.timeout(60 + count / _FEWEST_PER_S):
                await done.wait()

    def _lies(self, lie: Lie, asked: dict[int, int]) -> tuple[bytes, int]:
        known = list(asked.items())[-FRAMES_PER_MESSAGE:] or [(1, 5)]
        frames = []
        for handle, length in known:
            valid = self._mutator.random.choice(lie.frames(handle, length))
            frames.append(self._mutator.mutate_fields(valid))
        body = lie.answer(frames=frames).SerializeToString()
        if self._mutator.random.random() < _GARBAGE / 10:
            body = self._mutator.mutate_bytes(body)
        return body, len(frames)

    async def _ask_liar(self, address: str) -> None:
        """Requests for the revision that the hostile verifier serves, until cancelled."""
        generate = corpus.ROUTER[0]
        async with open_channel(address) as channel:
            while True:
                try:
                    async with asyncio.timeout(_CALL_S):
                        await _ask(channel, generate, corpus.FOR_LIAR.SerializeToString())
                except (TimeoutError, grpc.aio.AioRpcError):
                    pass
                await asyncio.sleep(0.01)


async def _ask(channel: grpc.aio.Channel, rpc: Rpc, body: bytes) -> None:
    """Send a request as it is; of a stream only the first answer is awaited."""
    if not rpc.streams:
        ask: Any = channel.unary_unary(rpc.path)
        await ask(body, timeout=_CALL_S)
        return
    begin: Any = channel.unary_stream(rpc.path)
    call = begin(body)
    try:
        await call.read()
    finally:
        call.cancel()


async def _drain(call: Any) -> None:
    async for _ in call:
        pass


async def _learn(requests: AsyncIterator[bytes], lie: Lie, asked: dict[int, int]) -> None:
    """What the peer asks, and how long its texts are by now."""
    async for body in requests:
        for frame in lie.question.FromString(body).frames:
            lie.learn(frame, asked)


@asynccontextmanager
async def serving(address: str, path: str, behaviour: Any) -> AsyncIterator[None]:
    """A server of one method whose messages are bytes."""
    _, service, method = path.split("/")
    handler = grpc.method_handlers_generic_handler(
        service, {method: grpc.stream_stream_rpc_method_handler(behaviour)}
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(address)
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)
