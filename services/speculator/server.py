"""The speculator's RPC and life-cycle."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc

from treecast.engine.base import Engine
from treecast.engine.openmp import load_on_thread
from treecast.sampling.compiler import GrammarCompiler
from treecast.sampling.grammar import Grammars
from treecast.sampling.params import Law
from treecast.telemetry.process import ProcessCollector
from treecast.telemetry.traces import open_tracing
from treecast.v1 import speculator_pb2 as pb
from treecast.v1 import speculator_pb2_grpc
from treecast.wire.acceptor import Acceptor
from treecast.wire.frames import Heartbeat, Hello, Role
from treecast.wire.guarded_redis import GuardedRedis
from treecast.wire.hop import SPECULATE
from treecast.wire.lifecycle import begin, serve_until_stopped
from treecast.wire.server import Server
from treecast.wire.tls import tls_of

from .grower import Grower
from .loading import load_engines, load_grammars, make_drafter, warm_up
from .metrics import SpeculatorMetrics
from .orders import Result
from .reloading import Reloading, drafts_of
from .sessions import Sessions
from .settings import SpeculatorSettings


class Speculator(
    speculator_pb2_grpc.SpeculatorServiceServicer,
    speculator_pb2_grpc.SpeculatorAdminServiceServicer,
):
    """One speculator process: drafters, the thread that drafts, streams to verifiers."""

    def __init__(
        self,
        settings: SpeculatorSettings,
        engines: Sequence[Engine],
        instance_id: str,
        thread: ThreadPoolExecutor,
        grammars: Grammars | None = None,
    ) -> None:
        self._settings = settings
        self._instance_id = instance_id
        self.tls = tls_of(settings)
        self.metrics = SpeculatorMetrics()
        self._drafter = thread.submit(make_drafter, settings, engines, self.metrics).result()
        self.grower = Grower(
            self._drafter, self._deliver, self.metrics, thread, settings.run_ahead_nodes
        )
        self.tracing = open_tracing(settings.otlp_endpoint, "speculator", instance_id)
        self.sessions = Sessions(
            self.grower.submit,
            settings.capacity,
            settings.max_sessions,
            self.metrics,
            instance_id,
            self.tracing,
            GrammarCompiler(grammars),
        )
        drafts = drafts_of(settings, self._drafter, engines)
        self.reloading = Reloading(settings, drafts, self.grower, self.sessions, self.metrics)
        self._verifiers = Acceptor(SPECULATE, self._hello, self._heartbeat, self.sessions)
        self.metrics.registry.register(
            ProcessCollector("speculator", self._models, lambda: self.sessions.draining)
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reloads: set[asyncio.Task[None]] = set()

    def warm_up(self) -> None:
        """Draft once before the first session does; blocks. The first passes are the slowest."""
        self.grower.slowest_draft_s = warm_up(self._drafter, self._engines)

    def start(self) -> None:
        """Begin drafting; on the event loop that serves."""
        self._loop = asyncio.get_running_loop()
        self.grower.start()

    @property
    def offers_reload(self) -> bool:
        """Whether callers may have drafts replaced: nobody is asked for a key here."""
        return self._settings.drafts_root is not None

    def reload_on_hangup(self) -> None:
        """At SIGHUP read the drafts' folders again; on the event loop that serves."""
        loop = asyncio.get_running_loop()

        def begin_reloading() -> None:
            reloading = loop.create_task(self.reloading.reload_all())
            self._reloads.add(reloading)
            reloading.add_done_callback(self._reloads.discard)

        loop.add_signal_handler(signal.SIGHUP, begin_reloading)

    async def drain(self) -> None:
        """Take no new sessions, wait for those attached to end, then close the streams."""
        self.sessions.draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_s):
                await self.sessions.finished()
        self.close()

    def close(self) -> None:
        """Stop at once; verifiers decode plainly, or with others' trees."""
        self.reloading.close()
        self._verifiers.close("the speculator is stopping")
        self.sessions.grammars.close()
        self.grower.close()

    def _deliver(self, results: Sequence[Result]) -> None:
        """From the drafting thread to the event loop."""
        assert self._loop is not None, "results come after start"
        self._loop.call_soon_threadsafe(self.sessions.deliver, results)

    def _models(self) -> set[str]:
        """Target models of the verifiers that are connected."""
        return {link.peer.model for link in self._verifiers.links}

    @property
    def _engines(self) -> list[Engine]:
        """Of the draft models that serve now."""
        return [draft.engine for draft in self.reloading.drafts]

    def _hello(self) -> Hello:
        """A lookup has no vocabulary of its own: size 0 and no tokenizer fit every verifier."""
        engines = self._engines
        info = engines[0].info if engines else None
        return Hello(
            instance_id=self._instance_id,
            role=Role.SPECULATOR,
            vocab_size=info.vocab_size if info else 0,
            tokenizer_hash=info.tokenizer_hash if info else "",
            laws=tuple(Law),
            capacity=self._settings.capacity,
            proposers=self._drafter.names,
            model="+".join(engine.info.name for engine in engines),
            model_revision="+".join(engine.info.revision for engine in engines),
            context_tokens=min((e.info.context_tokens for e in engines), default=0),
            shares_cores=self._settings.shares_cores,
        )

    def _heartbeat(self) -> Heartbeat:
        attached = len(self.sessions)
        usages = [engine.usage for engine in self._engines]
        return Heartbeat(
            steps=self.grower.num_drafts,
            step_age_ms=round(1000 * self.grower.draft_age_s),
            step_predicted_ms=round(1000 * self.grower.slowest_draft_s),
            free_capacity=max(0, self._settings.max_sessions - attached),
            running=attached,
            kv_pages_free=sum(usage.free for usage in usages),
            kv_pages_total=sum(usage.total for usage in usages),
            draining=self.sessions.draining,
        )

    async def Speculate(
        self,
        request_iterator: AsyncIterator[pb.SpeculateRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.SpeculateResponse]:
        """One verifier's stream."""
        async for message in self._verifiers.accept(request_iterator, context):
            yield message

    async def Reload(
        self, request: pb.ReloadRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ReloadResponse:
        """Answers once the new draft has taken over, or has not."""
        reloaded = await self.reloading.reload(request.drafter, request.model)
        return pb.ReloadResponse(
            drafter=reloaded.drafter,
            model=reloaded.after.name,
            revision_before=reloaded.before.revision,
            revision=reloaded.after.revision,
            sessions_moved=reloaded.moved,
            sessions_kept=reloaded.kept,
        )


def server_of(speculator: Speculator) -> Server:
    """A server of its RPC."""
    server = Server(tls=speculator.tls)
    server.add(
        speculator_pb2_grpc.add_SpeculatorServiceServicer_to_server,
        speculator,
        "treecast.v1.SpeculatorService",
        callers=["verifier"],
    )
    if speculator.offers_reload:
        server.add(
            speculator_pb2_grpc.add_SpeculatorAdminServiceServicer_to_server,
            speculator,
            "treecast.v1.SpeculatorAdminService",
            callers=["client"],
        )
    return server


async def serve(settings: SpeculatorSettings) -> None:
    """Load the drafters and serve until a signal.

    Raises:
        ModelError: the draft model cannot be loaded.
        SettingsError: an address cannot be bound.
    """
    instance_id = begin(settings, Role.SPECULATOR)
    thread, engines = load_on_thread(lambda: load_engines(settings))
    grammars = load_grammars(settings, engines)
    speculator = Speculator(settings, engines, instance_id, thread, grammars)
    server = server_of(speculator)
    thread.submit(speculator.warm_up).result()
    speculator.start()
    speculator.reload_on_hangup()
    try:
        await serve_until_stopped(
            settings,
            Role.SPECULATOR,
            instance_id,
            server,
            GuardedRedis(settings.redis_url),
            speculator.metrics.registry,
            speculator.drain,
            "+".join(spec.name for spec in settings.specs),
        )
    finally:
        speculator.close()
        await asyncio.to_thread(speculator.tracing.close)
