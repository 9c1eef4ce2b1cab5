"""A whole mesh in this process, on real ports: router, toy verifiers, speculators."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from treecast import AsyncClient, SamplingParams
from treecast.engine.toy import ToyEngine
from treecast.services.router.server import Router
from treecast.services.router.settings import RouterSettings
from treecast.services.speculator.server import Speculator
from treecast.services.speculator.server import server_of as server_of_speculator
from treecast.services.speculator.settings import SpeculatorSettings
from treecast.services.verifier.server import Verifier, server_of
from treecast.services.verifier.settings import VerifierSettings
from treecast.text.tokenizer import TokenizerFiles
from treecast.wire.guarded_redis import GuardedRedis
from treecast.wire.tls import TlsFiles

from ..byte_tokenizer import SPECIAL_TOKENS, TEMPLATE, byte_tokenizer

PROMPT = [5, 6, 7]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
NUMBERS = itertools.count(1)

Certificates = Mapping[str, TlsFiles]


@dataclass(frozen=True)
class ToyModel:
    """What the toys pass for."""

    vocab_size: int
    files: TokenizerFiles


NUMBER_MODEL = ToyModel(97, TokenizerFiles())
BYTE_MODEL = ToyModel(
    258, TokenizerFiles(byte_tokenizer().to_str().encode(), TEMPLATE, SPECIAL_TOKENS)
)


def tls_settings(certificates: Certificates, role: str) -> dict[str, Any]:
    files = certificates.get(role, TlsFiles())
    return {"tls_cert": files.cert, "tls_key": files.key, "tls_ca": files.ca}


@dataclass
class Worker:
    address: str
    verifier: Verifier


@dataclass
class Mesh:
    router: Router
    verifiers: list[Worker]
    speculators: Sequence[str]
    certificates: Certificates

    @property
    def address(self) -> str:
        return self.router.address

    def client(self, **access: Any) -> AsyncClient:
        """Of a client with its certificate, unless told otherwise."""
        return AsyncClient(self.address, **({"tls": self.certificates.get("client")} | access))

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for something that the router learns from its verifiers."""
        assert await self.router.fleet.until(lambda: holds() or None, 60)


@asynccontextmanager
async def toy_verifier(
    certificates: Certificates = {},  # noqa: B006
    shifts: Mapping[str, int] = {},
    model: ToyModel = NUMBER_MODEL,
    **settings: Any,
) -> AsyncIterator[Worker]:
    """`shifts` are the toy's adapters."""
    settings = {"engine": "toy", "metrics_listen": None} | settings
    given = VerifierSettings(**settings, **tls_settings(certificates, "verifier"))
    thread, redis = ThreadPoolExecutor(1), GuardedRedis(given.redis_url)
    engine = ToyEngine(model.vocab_size, step_s=given.toy_step_s, adapters=shifts)
    name = f"verifier-{next(NUMBERS)}"
    verifier = Verifier(given, engine, model.files, redis, name, thread)
    server = server_of(verifier)
    try:
        await verifier.start()
        yield Worker(await server.listen("127.0.0.1:0"), verifier)
    finally:
        await verifier.close()
        await server.stop()
        await redis.close()


@asynccontextmanager
async def toy_speculator(
    name: str = "speculator-0",
    certificates: Certificates = {},  # noqa: B006
    model: ToyModel = NUMBER_MODEL,
    **settings: Any,
) -> AsyncIterator[str]:
    """Looks up, unless told to draft otherwise; the drafter `ssm` is the toy itself."""
    settings = {"drafters": ("ngram",), "engine": "toy"} | settings
    given = SpeculatorSettings(**settings, **tls_settings(certificates, "speculator"))
    engines = [ToyEngine(model.vocab_size)] if "ssm" in given.drafters else []
    speculator = Speculator(given, engines, name, ThreadPoolExecutor(1))
    server = server_of_speculator(speculator)
    await asyncio.to_thread(speculator.warm_up)
    speculator.start()
    try:
        yield await server.listen("127.0.0.1:0")
    finally:
        speculator.close()
        await asyncio.to_thread(speculator.tracing.close)
        await server.stop()


@asynccontextmanager
async def toy_mesh(
    certificates: Certificates = {},  # noqa: B006
    num_verifiers: int = 1,
    drafters: Sequence[str] = ("ngram",),
    model: ToyModel = NUMBER_MODEL,
    otlp_endpoint: str | None = None,
    speculators: Mapping[str, Any] = {},
    verifiers: Mapping[str, Any] = {},
    **router: Any,
) -> AsyncIterator[Mesh]:
    """All of it, with the router's streams open and the verifiers' to the speculators.

    Args:
        drafters: of as many speculators, one each.
        otlp_endpoint: of all services, but where their own settings say otherwise.
        speculators, verifiers, router: settings of these alone.
    """
    traced = {"otlp_endpoint": otlp_endpoint}
    async with AsyncExitStack() as stack:
        options = traced | dict(speculators)
        drafting = [
            await stack.enter_async_context(
                toy_speculator(
                    f"speculator-{place}", certificates, model, drafters=(drafter,), **options
                )
            )
            for place, drafter in enumerate(drafters)
        ]
        options = traced | {"speculators": tuple(drafting), "planner": "full"} | dict(verifiers)
        workers = [
            await stack.enter_async_context(toy_verifier(certificates, model=model, **options))
            for _ in range(num_verifiers)
        ]
        options = traced | {"verifiers": tuple(worker.address for worker in workers)} | router
        options |= {"metrics_listen": None} | tls_settings(certificates, "router")
        settings = RouterSettings(**options)
        router_ = await stack.enter_async_context(Router(settings, f"router-{next(NUMBERS)}"))
        mesh = Mesh(router_, workers, drafting, certificates)
        await mesh.until(lambda: len(router_.fleet.candidates()) == num_verifiers)
        async with asyncio.timeout(60):
            for worker in workers:
                while len(worker.verifier.assignments.instances) < len(drafting):
                    await asyncio.sleep(0.01)  # nothing tells when a verifier's stream opens
        yield mesh


@asynccontextmanager
async def byte_mesh(
    drafters: Sequence[str] = ("ssm", "ngram"), **settings: Any
) -> AsyncIterator[str]:
    """A toy mesh whose tokens are bytes; yields the router's address."""
    async with toy_mesh(drafters=drafters, model=BYTE_MODEL, **settings) as mesh:
        yield mesh.address
