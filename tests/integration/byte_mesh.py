"""A whole mesh of toys in one process: real servers, each on a port of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from types import MappingProxyType
from typing import Any

from treecast.engine.toy import ToyEngine
from treecast.services.router.router import Router
from treecast.services.router.settings import RouterSettings
from treecast.services.speculator.server import Speculator
from treecast.services.speculator.settings import SpeculatorSettings
from treecast.services.verifier.server import Verifier, server_of
from treecast.services.verifier.settings import VerifierSettings
from treecast.text.tokenizer import TokenizerFiles
from treecast.v1 import speculator_pb2_grpc
from treecast.wire.guarded_redis import GuardedRedis
from treecast.wire.server import Server

from ..byte_tokenizer import SPECIAL_TOKENS, TEMPLATE, byte_tokenizer

VOCAB = 258
TIMEOUT_S = 20


@asynccontextmanager
async def speculator(name: str, drafter: str, **settings: Any) -> AsyncIterator[str]:
    """Serve a speculator; yields its address."""
    engines = [ToyEngine(vocab_size=VOCAB)] if drafter == "ssm" else []
    configured = SpeculatorSettings(drafters=(drafter,), engine="toy", **settings)
    one = Speculator(configured, engines, name, ThreadPoolExecutor(1))
    server = Server()
    server.add(
        speculator_pb2_grpc.add_SpeculatorServiceServicer_to_server,
        one,
        "treecast.v1.SpeculatorService",
    )
    address = await server.listen("127.0.0.1:0")
    one.start()
    try:
        yield address
    finally:
        one.close()
        await asyncio.to_thread(one.tracing.close)
        await server.stop(0)


@asynccontextmanager
async def verifier(speculators: Sequence[str], **settings: Any) -> AsyncIterator[str]:
    """Serve a verifier with a tokenizer of bytes, attached to all speculators."""
    configured = VerifierSettings(
        engine="toy", planner="full", speculators=tuple(speculators), **settings
    )
    files = TokenizerFiles(byte_tokenizer().to_str().encode(), TEMPLATE, SPECIAL_TOKENS)
    one = Verifier(
        configured,
        ToyEngine(vocab_size=VOCAB),
        files,
        GuardedRedis(None),
        "verifier-0",
        ThreadPoolExecutor(1),
    )
    server = server_of(one)
    address = await server.listen("127.0.0.1:0")
    await one.start()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while len(one.speculation.instances) < len(speculators):
                await asyncio.sleep(0.01)  # the service has no such event
        yield address
    finally:
        await one.close()
        await server.stop(0)


@asynccontextmanager
async def toy_mesh(
    drafters: Sequence[str] = ("ssm", "ngram"),
    speculators: Mapping[str, Any] = MappingProxyType({}),
    verifiers: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> AsyncIterator[str]:
    """Serve a mesh; yields the router's address.

    Args:
        speculators, verifiers: settings of these alone.
        settings: those of all services.
    """
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        drafting = {**settings, **speculators}
        names = [f"speculator-{number}" for number in range(len(drafters))]
        addresses = [
            await enter(speculator(name, drafter, **drafting))
            for name, drafter in zip(names, drafters, strict=True)
        ]
        verifying = {**settings, **verifiers}
        seeds = (await enter(verifier(addresses, **verifying)),)
        configured = RouterSettings(verifiers=seeds, metrics_listen=None, **settings)
        router = await enter(Router(configured, "router-0"))
        async with asyncio.timeout(TIMEOUT_S):
            await router.fleet.until(lambda: bool(router.fleet.open_hellos()) or None, TIMEOUT_S)
        yield router.address
