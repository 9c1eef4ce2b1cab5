"""A real verifier on a real port with the toy engine, and both of its neighbours under control."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from treecast.engine.toy import ToyEngine, toy_logits
from treecast.errors import TreecastError
from treecast.sampling.params import SamplingParams
from treecast.sampling.pick import Picker
from treecast.sampling.transforms import Context
from treecast.services.verifier.server import Verifier, server_of
from treecast.services.verifier.settings import VerifierSettings
from treecast.text.tokenizer import TokenizerFiles
from treecast.v1 import speculator_pb2_grpc
from treecast.wire.acceptor import Acceptor
from treecast.wire.dialer import Dialer
from treecast.wire.frames import (
    BadFrame,
    Cancel,
    Completed,
    Cost,
    Failed,
    Heartbeat,
    Hello,
    Progress,
    Role,
    RouterFrame,
    ServingFrame,
    SpeculatorFrame,
    Start,
    VerifierFrame,
)
from treecast.wire.guarded_redis import GuardedRedis
from treecast.wire.hop import SERVE, SPECULATE
from treecast.wire.link import Link
from treecast.wire.server import Server

VOCAB = 97


def plain(
    prompt: Sequence[int], sampling: SamplingParams, noise_key: int = 0, shift: int = 0
) -> list[int]:
    """The oracle: plain decoding of the toy model, without engine, cache or tree."""
    tokens = list(prompt)
    picker = Picker(sampling, noise_key, Context(prompt))
    for _ in range(sampling.max_tokens):
        token = picker.pick(toy_logits(tokens, VOCAB, shift))
        picker.accept(token)
        tokens.append(token)
    return tokens[len(prompt) :]


@dataclass
class Outcome:
    """What one request has yielded so far."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    completed: Completed | None = None
    error: TreecastError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, holds: Callable[[Outcome], bool]) -> Outcome:
        """Wait until something holds, a minute at most: the machine may be busy."""
        async with asyncio.timeout(60):
            while not holds(self):
                self.changed.clear()
                await self.changed.wait()
        return self

    async def end(self) -> Outcome:
        return await self.until(lambda o: o.completed is not None or o.error is not None)


class RouterEnd:
    """The router's side of a `Serve` stream."""

    def __init__(self, address: str, instance_id: str = "test-router") -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.offsets: dict[int, int] = {}  # handle -> output tokens committed elsewhere
        self.open = asyncio.Event()
        self._handles = itertools.count(1)
        self.dialer = Dialer(
            address, SERVE, lambda: Hello(instance_id, Role.ROUTER), Heartbeat, self
        )

    @property
    def link(self) -> Link[RouterFrame, ServingFrame]:
        link = self.dialer.link
        assert link is not None, "no stream to the verifier"
        return link

    def start(
        self, prompt: Sequence[int], sampling: SamplingParams | None = None, **fields: Any
    ) -> tuple[int, Outcome]:
        """Send a request; greedy with 16 tokens unless told otherwise."""
        handle = next(self._handles)
        self.outcomes[handle] = Outcome()
        sampling = sampling or SamplingParams(temperature=0, max_tokens=16)
        fields = {"noise_key": 0, "request_id": f"r{handle}"} | fields
        self.link.send(Start(handle, prompt=tuple(prompt), sampling=sampling, **fields))
        return handle, self.outcomes[handle]

    def cancel(self, handle: int) -> None:
        self.link.send(Cancel(handle))

    async def run(self, prompt: Sequence[int], *args: Any, **fields: Any) -> Outcome:
        _, outcome = self.start(prompt, *args, **fields)
        return await outcome.end()

    def opened(self, link: Link[RouterFrame, ServingFrame]) -> None:
        self.open.set()

    def closed(self, link: Link[RouterFrame, ServingFrame]) -> None:
        self.open.clear()

    def beat(self, link: Link[RouterFrame, ServingFrame], heartbeat: Heartbeat) -> None: ...

    def failed_frame(self, link: Link[RouterFrame, ServingFrame], error: BadFrame) -> None:
        raise AssertionError(f"the verifier sent a bad frame: {error}")

    def received(self, link: Link[RouterFrame, ServingFrame], frame: ServingFrame) -> None:
        outcome = self.outcomes[frame.handle]
        match frame:
            case Progress():
                assert frame.from_index == len(outcome.tokens) + self.offsets.get(frame.handle, 0)
                outcome.tokens.extend(frame.tokens)
                outcome.logprobs.extend(frame.logprobs)
                outcome.cost += frame.cost
            case Completed():
                outcome.completed = frame
            case Failed():
                outcome.error = frame.error
        outcome.changed.set()


class ScriptedSpeculator(speculator_pb2_grpc.SpeculatorServiceServicer):
    """A speculator that answers each frame with what `script` returns. May be hostile."""

    def __init__(
        self,
        script: Callable[[VerifierFrame], Sequence[SpeculatorFrame]],
        name: str = "scripted",
        capacity: int = 64,
        shares_cores: bool = False,
        proposers: Sequence[str] | None = None,
    ) -> None:
        self.script = script
        self.heartbeat = Heartbeat()
        self.frames: list[VerifierFrame] = []
        self.got = asyncio.Event()
        hello = Hello(
            f"spec-{name}",
            Role.SPECULATOR,
            VOCAB,
            capacity=capacity,
            proposers=(name,) if proposers is None else tuple(proposers),
            shares_cores=shares_cores,
        )
        self.acceptor: Acceptor[SpeculatorFrame, VerifierFrame] = Acceptor(
            SPECULATE, lambda: hello, lambda: self.heartbeat, self
        )

    async def Speculate(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        async for message in self.acceptor.accept(request_iterator, context):
            yield message

    def opened(self, link: Link[SpeculatorFrame, VerifierFrame]) -> None: ...

    def closed(self, link: Link[SpeculatorFrame, VerifierFrame]) -> None: ...

    def beat(self, link: Link[SpeculatorFrame, VerifierFrame], heartbeat: Heartbeat) -> None: ...

    def failed_frame(self, link: Link[SpeculatorFrame, VerifierFrame], error: BadFrame) -> None:
        raise AssertionError(f"the verifier sent a bad frame: {error}")

    def received(self, link: Link[SpeculatorFrame, VerifierFrame], frame: VerifierFrame) -> None:
        self.frames.append(frame)
        self.got.set()
        for answer in self.script(frame):
            link.send(answer)


@asynccontextmanager
async def speculator(servicer: ScriptedSpeculator) -> AsyncIterator[str]:
    """Serve a scripted speculator; yields its address."""
    server = Server()
    server.add(
        speculator_pb2_grpc.add_SpeculatorServiceServicer_to_server,
        servicer,
        "treecast.v1.SpeculatorService",
    )
    address = await server.listen("127.0.0.1:0")
    try:
        yield address
    finally:
        servicer.acceptor.close("test over")
        await server.stop(0)


@dataclass
class Rig:
    verifier: Verifier
    engine: ToyEngine
    router: RouterEnd
    address: str

    async def idle(self) -> None:
        """Wait until no request is left at a step boundary."""
        async with asyncio.timeout(60):
            await self.verifier.steps.finished()

    async def speculators(self, count: int) -> None:
        """Wait for open streams to so many speculators."""
        async with asyncio.timeout(60):
            while len(self.verifier.assignments.instances) != count:
                await asyncio.sleep(0.01)  # the service has no such event


@asynccontextmanager
async def verifier_rig(
    engine: ToyEngine | None = None,
    tokenizer: TokenizerFiles | None = None,
    instance_id: str = "test",
    **settings: Any,
) -> AsyncIterator[Rig]:
    """A running verifier, and a router with an open stream to it."""
    engine = engine or ToyEngine(vocab_size=VOCAB)
    configured = VerifierSettings(engine="toy", **settings)
    verifier = Verifier(
        configured,
        engine,
        tokenizer or TokenizerFiles(),
        GuardedRedis(None),
        instance_id,
        ThreadPoolExecutor(1),
    )
    server = server_of(verifier)
    address = await server.listen("127.0.0.1:0")
    await verifier.start()
    router = RouterEnd(address)
    router.dialer.start()
    try:
        async with asyncio.timeout(60):
            await router.open.wait()
        yield Rig(verifier, engine, router, address)
    finally:
        await router.dialer.close()
        await verifier.close()
        await server.stop(0)
