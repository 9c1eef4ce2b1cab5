"""A router behind its real port, over verifiers that follow a script on theirs."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2_grpc
from prometheus_client import CollectorRegistry

from treecast.services.router.server import Router
from treecast.services.router.settings import RouterSettings
from treecast.v1 import router_pb2 as pb
from treecast.v1 import router_pb2_grpc
from treecast.wire.channel import open_channel
from treecast.wire.registry import Entry
from treecast.wire.status import from_rpc_error

from ...byte_tokenizer import BOS
from ..scripted_verifier import ScriptedVerifier

HELLO = (BOS, *b"hello")
ROUTERS = itertools.count(1)


@dataclass
class Reply:
    """A `Generate` stream as a client sees it."""

    call: Any
    events: list[pb.GenerateResponse] = field(default_factory=list)

    async def read(self, done: Callable[[Self], bool]) -> Self:
        """Read on until `done`; a stream that ends before fails the test."""
        async with asyncio.timeout(10):
            while not done(self):
                event = await self.call.read()
                assert event is not grpc.aio.EOF, f"ended after {self.events}"
                self.events.append(event)
        return self

    async def read_tokens(self, count: int) -> Self:
        return await self.read(lambda reply: len(reply.tokens()) >= count)

    async def read_all(self) -> Self:
        """To the end. Raises the error that the stream ended with, translated."""
        async with asyncio.timeout(10):
            try:
                while (event := await self.call.read()) is not grpc.aio.EOF:
                    self.events.append(event)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from None
        return self

    def of(self, kind: str, sample: int = 0) -> list[Any]:
        return [
            getattr(event, kind)
            for event in self.events
            if event.WhichOneof("event") == kind and event.sample_index == sample
        ]

    def tokens(self, sample: int = 0) -> list[int]:
        return [token for delta in self.of("delta", sample) for token in delta.token_ids]

    def text(self, sample: int = 0) -> str:
        return "".join(delta.text for delta in self.of("delta", sample))

    @property
    def finished(self) -> pb.Finished:
        [finished] = self.of("finished")
        return finished


class RouterClient:
    """A client of one router."""

    def __init__(self, router: Router, channel: grpc.aio.Channel) -> None:
        self.router = router
        self.stub: Any = router_pb2_grpc.RouterServiceStub(channel)
        self.health: Any = health_pb2_grpc.HealthStub(channel)

    def generate(self, timeout: float | None = None, **request: Any) -> Reply:
        """A request for 5 greedy tokens after "hello", unless it says otherwise."""
        prompts = {"text", "chat", "tokens"}
        base: dict[str, Any] = {} if prompts & request.keys() else {"text": "hello"}
        base["sampling"] = {"temperature": 0, "max_tokens": 5} | request.pop("sampling", {})
        return Reply(self.stub.Generate(pb.GenerateRequest(**base, **request), timeout=timeout))

    async def streams(self, count: int) -> None:
        """Wait until the router has that many verifiers."""
        fleet = self.router.fleet
        assert await fleet.until(lambda: len(fleet.candidates()) == count or None, 10)

    async def queued(self, count: int) -> None:
        async with asyncio.timeout(10):
            # Nothing tells who joins the queue, so it is looked at.
            while self.router.service.num_waiting != count:
                await asyncio.sleep(0.001)

    def metric(self, name: str, **labels: str) -> float:
        return sample(self.router.metrics.registry, name, **labels)


def sample(registry: CollectorRegistry, name: str, **labels: str) -> float:
    """Sum of the samples that have these labels, whatever others they have."""
    return sum(
        sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == f"treecast_router_{name}" and labels.items() <= sample.labels.items()
    )


@asynccontextmanager
async def routing(
    verifiers: Sequence[ScriptedVerifier] = (), redis_url: str | None = None, **settings: Any
) -> AsyncIterator[RouterClient]:
    """A router over some verifiers, with the streams to them open."""
    settings = {
        "verifiers": tuple(verifier.address for verifier in verifiers),
        "redis_url": redis_url,
        "verifier_grace_s": 10.0,
        "metrics_listen": None,
    } | settings
    async with (
        Router(RouterSettings(**settings), f"router-{next(ROUTERS)}") as router,
        open_channel(router.address) as channel,
    ):
        client = RouterClient(router, channel)
        await client.streams(len(verifiers))
        yield client


def entries(*verifiers: ScriptedVerifier) -> tuple[Entry, ...]:
    return tuple(Entry(verifier.address) for verifier in verifiers)
