"""Both ends of the speculate stream over a real port, with handlers that keep what they hear."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from treecast.errors import TreecastError
from treecast.sampling.params import SamplingParams
from treecast.v1 import speculator_pb2 as pb
from treecast.v1.speculator_pb2_grpc import (
    SpeculatorServiceServicer,
    SpeculatorServiceStub,
    add_SpeculatorServiceServicer_to_server,
)
from treecast.wire import codec
from treecast.wire.acceptor import Acceptor
from treecast.wire.channel import open_channel
from treecast.wire.dialer import Dialer
from treecast.wire.frames import Attach, BadFrame, Commit, Heartbeat, Hello, Role
from treecast.wire.hop import SPECULATE
from treecast.wire.link import Link
from treecast.wire.server import Server
from treecast.wire.status import from_rpc_error

TIMEOUT_S = 10.0
GREEDY = SamplingParams(temperature=0)
VERIFIER = Hello("verifier-1", Role.VERIFIER, vocab_size=100, tokenizer_hash="abc")
SPECULATOR = Hello(
    "speculator-1", Role.SPECULATOR, vocab_size=100, tokenizer_hash="abc", proposers=("ssm",)
)


def attach(handle: int, *tokens: int) -> Attach:
    return Attach(handle, tokens or (1,), 1, GREEDY, noise_key=7, node_budget=16)


def commit(handle: int, from_len: int, *tokens: int) -> Commit:
    return Commit(handle, from_len, tokens, 16)


class Recorder:
    """A `PairHandler` whose calls a test waits for; `react` may answer or raise."""

    def __init__(self, react: Callable[[Link[Any, Any], Any], None] | None = None) -> None:
        self.links: list[Link[Any, Any]] = []
        self.events: list[str] = []
        self.frames: list[Any] = []
        self.failures: list[BadFrame] = []
        self.beats: list[Heartbeat] = []
        self._react = react
        self._changed = asyncio.Event()

    def opened(self, link: Link[Any, Any]) -> None:
        self.links.append(link)
        self._note(f"opened {link.peer.instance_id}")

    def received(self, link: Link[Any, Any], frame: Any) -> None:
        self.frames.append(frame)
        self._note(f"received {type(frame).__name__} {frame.handle}")
        if self._react is not None:
            self._react(link, frame)

    def failed_frame(self, link: Link[Any, Any], error: BadFrame) -> None:
        self.failures.append(error)
        self._note(f"failed {error.handle}")

    def beat(self, link: Link[Any, Any], heartbeat: Heartbeat) -> None:
        self.beats.append(heartbeat)
        self._changed.set()

    def closed(self, link: Link[Any, Any]) -> None:
        self._note(f"closed {link.peer.instance_id}: {link.why_closed}")

    def _note(self, event: str) -> None:
        self.events.append(event)
        self._changed.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for a condition on what was recorded."""
        async with asyncio.timeout(TIMEOUT_S):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    async def heard(self, event: str) -> None:
        """Wait for an event that begins so."""
        await self.until(lambda: any(known.startswith(event) for known in self.events))


class Speculator(SpeculatorServiceServicer):
    def __init__(self, acceptor: Acceptor[Any, Any]) -> None:
        self._acceptor = acceptor

    async def Speculate(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:  # type: ignore[override]
        async for message in self._acceptor.accept(request_iterator, context):
            yield message


@dataclasses.dataclass
class Served:
    address: str
    recorder: Recorder
    acceptor: Acceptor[Any, Any]
    server: Server


@contextlib.asynccontextmanager
async def speculator(
    hello: Hello = SPECULATOR,
    recorder: Recorder | None = None,
    address: str = "127.0.0.1:0",
) -> AsyncIterator[Served]:
    """A speculator's end of the stream, on a real port."""
    recorder = recorder or Recorder()
    acceptor = Acceptor(SPECULATE, lambda: hello, Heartbeat, recorder)
    server = Server()
    server.add(
        add_SpeculatorServiceServicer_to_server,
        Speculator(acceptor),
        "treecast.v1.SpeculatorService",
    )
    bound = await server.listen(address)
    try:
        yield Served(bound, recorder, acceptor, server)
    finally:
        acceptor.close("server stops")
        await server.stop()


@contextlib.asynccontextmanager
async def verifier(
    address: str,
    hello: Hello = VERIFIER,
    recorder: Recorder | None = None,
    heartbeat: Callable[[], Heartbeat] = Heartbeat,
) -> AsyncIterator[tuple[Dialer[Any, Any], Recorder]]:
    """A verifier's end: a dialer."""
    recorder = recorder or Recorder()
    dialer = Dialer(address, SPECULATE, lambda: hello, heartbeat, recorder)
    dialer.start()
    try:
        yield dialer, recorder
    finally:
        await dialer.close()


async def problem_of(dialer: Dialer[Any, Any]) -> Exception:
    """Wait until a dialer has failed."""
    async with asyncio.timeout(TIMEOUT_S):
        while dialer.problem is None:  # it has no event for this
            await asyncio.sleep(0.01)
    return dialer.problem


class RawVerifier:
    """A peer that says just what the test makes it say: no heartbeats, no caps."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call = SpeculatorServiceStub(channel).Speculate()  # type: ignore[call-arg, var-annotated]

    async def say(self, *frames: Any) -> None:
        await self.write(codec.encode_verifier_frames(frames))

    async def write(self, message: pb.SpeculateRequest) -> None:
        await self.call.write(message)

    async def hear(self) -> list[Any]:
        return list(codec.decode_speculator_frames(await self.call.read()))

    async def end(self) -> TreecastError:
        """Read to the end of the call, and say what ended it."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while True:
                    await self.hear()
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error)


@contextlib.asynccontextmanager
async def raw_verifier(address: str) -> AsyncIterator[RawVerifier]:
    async with open_channel(address, max_message_bytes=-1) as channel:
        raw = RawVerifier(channel)
        try:
            yield raw
        finally:
            raw.call.cancel()


class ReluctantSpeculator(SpeculatorServiceServicer):
    """A peer that greets and beats, but reads nothing until it may."""

    def __init__(self) -> None:
        self.may_read = asyncio.Event()
        self.newest: dict[int, int] = {}
        self.num_frames = 0
        self._changed = asyncio.Event()

    async def Speculate(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:  # type: ignore[override]
        yield codec.encode_speculator_frames([SPECULATOR])
        while not self.may_read.is_set():
            yield codec.encode_speculator_frames([Heartbeat()])
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.may_read.wait(), 0.2)
        async for message in request_iterator:
            for frame in codec.decode_verifier_frames(message):
                self._note(frame)
            yield codec.encode_speculator_frames([Heartbeat()])

    def _note(self, frame: Any) -> None:
        if isinstance(frame, Attach):
            self.num_frames += 1
            self.newest[frame.handle] = frame.noise_key
            self._changed.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not holds():
                self._changed.clear()
                await self._changed.wait()


@contextlib.asynccontextmanager
async def reluctant_speculator() -> AsyncIterator[tuple[ReluctantSpeculator, str]]:
    server, servicer = Server(), ReluctantSpeculator()
    server.add(add_SpeculatorServiceServicer_to_server, servicer, "treecast.v1.SpeculatorService")
    try:
        yield servicer, await server.listen("127.0.0.1:0")
    finally:
        await server.stop()
