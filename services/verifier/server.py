"""The verifier's RPCs and life-cycle."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc
import structlog

from treecast.engine.base import Engine
from treecast.engine.curve import measure_curve
from treecast.engine.openmp import load_on_thread
from treecast.engine.sharding.shape import Place
from treecast.errors import NotServed, Unavailable
from treecast.sampling.compiler import GrammarCompiler
from treecast.sampling.grammar import Grammars
from treecast.sampling.params import Law
from treecast.telemetry.process import ProcessCollector
from treecast.telemetry.traces import open_tracing
from treecast.text.tokenizer import TokenizerFiles
from treecast.v1 import verifier_pb2 as pb
from treecast.v1 import verifier_pb2_grpc
from treecast.wire import codec
from treecast.wire.acceptor import Acceptor
from treecast.wire.channel import MAX_ANSWER_BYTES
from treecast.wire.frames import Heartbeat, Hello, Role
from treecast.wire.guarded_redis import GuardedRedis
from treecast.wire.hop import SERVE, SPECULATE
from treecast.wire.lifecycle import begin, serve_until_stopped
from treecast.wire.registry import Registry
from treecast.wire.server import Server
from treecast.wire.streams import Streams
from treecast.wire.tls import tls_of

from .admission import Admission
from .assignments import Assignments
from .choice import make_policy
from .loading import load_engine, read_tokenizer
from .metrics import VerifierMetrics
from .settings import VerifierSettings
from .speculation import Speculation
from .step import StepLoop

LAST_FRAMES_S = 1.0
"""For routers to take the last frames of what has been let finish."""

log = structlog.get_logger()


class Verifier(verifier_pb2_grpc.VerifierServiceServicer):
    """One verifier process: engine, step loop, streams to routers and speculators."""

    def __init__(
        self,
        settings: VerifierSettings,
        engine: Engine,
        tokenizer: TokenizerFiles,
        redis: GuardedRedis,
        instance_id: str,
        thread: ThreadPoolExecutor,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._tokenizer = tokenizer
        self._instance_id = instance_id
        self._draining = self._stopping = False
        self._hand_over: asyncio.TimerHandle | None = None
        self.tls = tls_of(settings)
        self.metrics = VerifierMetrics()
        self.metrics.memory.watch_weights(lambda: engine.moved_bytes)
        model = engine.info.name
        self.metrics.registry.register(
            ProcessCollector("verifier", lambda: [model], lambda: self._draining)
        )
        curve = thread.submit(measure_curve, engine, settings.max_rows).result()
        policy = make_policy(settings, self.metrics.choice, curve)
        self.assignments = Assignments(
            policy, settings.max_nodes, settings.trusted_speculators, self.metrics.trees
        )
        speculation = Speculation(self.assignments, self.metrics.trees)
        self._tracing = open_tracing(settings.otlp_endpoint, "verifier", instance_id)
        self.steps = StepLoop(
            engine,
            thread,
            settings,
            self.assignments,
            speculation,
            curve,
            self.metrics,
            self._tracing,
        )
        info = engine.info
        grammars = Grammars.for_model(tokenizer.definition, info.eos_token_ids, info.vocab_size)
        self._grammars = GrammarCompiler(grammars, settings.grammar_s)
        self._admission = Admission(
            engine, self.steps, tokenizer.decoder(), self._check_law, self._tracing, self._grammars
        )
        self._routers = Acceptor(SERVE, self._hello, self._heartbeat, self._admission)
        self._registry = Registry(redis, Role.SPECULATOR, settings.speculators)
        self._speculators = Streams(SPECULATE, self._hello, self._heartbeat, speculation, self.tls)
        self._stepping: asyncio.Task[None] | None = None

    # --- life-cycle -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin stepping and dialing speculators."""
        self._stepping = asyncio.create_task(self.steps.run())
        self._stepping.add_done_callback(_stop_if_broken)
        if self._settings.speculators_per_session:
            await self._registry.start(self._speculators.follow)

    async def drain(self) -> None:
        """Take nothing new, let what runs finish, then close the streams.

        Raises:
            Exception: what broke the step loop; nothing is waited for then.
        """
        self._stopping = True
        assert self._stepping is not None, "drained before it was started"
        finished = asyncio.create_task(self._admission.finished())
        ends = [finished, self._stepping]
        await asyncio.wait(
            ends, timeout=self._settings.drain_s, return_when=asyncio.FIRST_COMPLETED
        )
        finished.cancel()
        broken = self._stepping.done()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._routers.sent(), LAST_FRAMES_S)
        await self.close()
        if broken:
            await self._stepping

    async def close(self) -> None:
        """Stop at once; routers re-place what was running."""
        self._keep_all()
        self._routers.close("the verifier is stopping")
        await self._registry.close()
        await self._speculators.close()
        if self._stepping is not None:
            self._stepping.cancel()
            await asyncio.gather(self._stepping, return_exceptions=True)
        self.steps.close()
        self._grammars.close()
        await asyncio.to_thread(self._tracing.close)

    def _hello(self) -> Hello:
        info = self._engine.info
        return Hello(
            instance_id=self._instance_id,
            role=Role.VERIFIER,
            vocab_size=info.vocab_size,
            tokenizer_hash=info.tokenizer_hash,
            laws=tuple(self._laws),
            capacity=self._settings.capacity,
            model=info.name,
            model_revision=info.revision,
            fingerprint=info.fingerprint,
            context_tokens=info.context_tokens,
            adapters=info.adapters,
            keeps_grammars=self._grammars.keeps_grammars,
        )

    @property
    def _laws(self) -> list[Law]:
        return [law for law in self._settings.laws if law in self.assignments.policy.laws]

    def _check_law(self, law: Law) -> None:
        """Raise NotServed, and why, for a law that is not served."""
        self.assignments.policy.check_law(law)
        if law not in self._laws:
            names = ", ".join(one.name.lower() for one in self._laws)
            raise NotServed(f"law {law.name.lower()} is not served; this verifier has {names}")

    def _heartbeat(self) -> Heartbeat:
        """Raises Unavailable, which ends the stream: a verifier that cannot step must not beat."""
        if self._stepping is not None and self._stepping.done():
            raise Unavailable("the verifier's step loop has ended")
        return self.steps.heartbeat(self._admission.num_preparing, self._draining or self._stopping)

    # --- RPCs -----------------------------------------------------------------------------------

    async def Serve(
        self,
        request_iterator: AsyncIterator[pb.ServeRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.ServeResponse]:
        """One router's stream."""
        async for message in self._routers.accept(request_iterator, context):
            yield message

    async def GetTokenizer(
        self, request: pb.GetTokenizerRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetTokenizerResponse:
        """The tokenizer's files."""
        info = self._engine.info
        if request.HasField("model_revision") and request.model_revision != info.revision:
            raise NotServed(
                f"model revision is {request.model_revision!r}; {info.revision!r} is served"
            )
        return pb.GetTokenizerResponse(
            model_revision=info.revision,
            tokenizer_hash=info.tokenizer_hash,
            tokenizer_json=self._tokenizer.definition,
            chat_template=self._tokenizer.chat_template,
            special_tokens=self._tokenizer.special_tokens,
        )

    async def GetLoad(
        self, request: pb.GetLoadRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.GetLoadResponse:
        """What the verifier is doing now."""
        curve = self.steps.curve.measured
        return pb.GetLoadResponse(
            identity=codec.encode_hello(self._hello()),
            load=codec.encode_heartbeat(self._heartbeat()),
            speculators=self.assignments.instances,
            retained_sessions=len(self.steps.sessions),
            step_ms_by_rows={rows: 1000 * seconds for rows, seconds in curve.items()},
        )

    async def Drain(
        self, request: pb.VerifierServiceDrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.VerifierServiceDrainResponse:
        """Routers hear of it by the next heartbeat; what is on its way is still taken."""
        self._keep_all()
        self._draining = True
        if request.HasField("hand_over_after_ms"):
            loop = asyncio.get_running_loop()
            after_s = request.hand_over_after_ms / 1000
            self._hand_over = loop.call_later(after_s, self.steps.hand_over)
        running = self._admission.num_requests
        log.info("verifier.draining", running=running)
        return pb.VerifierServiceDrainResponse(running=running)

    async def Resume(
        self, request: pb.VerifierServiceResumeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.VerifierServiceResumeResponse:
        """Raises Unavailable: the verifier is being stopped."""
        if self._stopping:
            raise Unavailable("verifier is stopping; it cannot be resumed")
        self._keep_all()
        self._draining = False
        log.info("verifier.resumed")
        return pb.VerifierServiceResumeResponse()

    def _keep_all(self) -> None:
        """Hand nothing over any more."""
        self.steps.keep()
        if self._hand_over is not None:
            self._hand_over.cancel()
            self._hand_over = None


def _stop_if_broken(stepping: asyncio.Task[None]) -> None:
    """Without its step loop a verifier is of no use: end the process, so that it is restarted.

    As told to stop, but for the exit code: `drain` raises what broke the loop.
    """
    if not stepping.cancelled():
        log.critical("steps.broken", exc_info=stepping.exception())
        signal.raise_signal(signal.SIGTERM)


def server_of(verifier: Verifier) -> Server:
    """A server of its RPCs. Streams stay within the usual cap; a tokenizer may be larger."""
    server = Server(tls=verifier.tls, max_answer_bytes=MAX_ANSWER_BYTES)
    server.add(
        verifier_pb2_grpc.add_VerifierServiceServicer_to_server,
        verifier,
        "treecast.v1.VerifierService",
        callers=["router"],
    )
    return server


async def serve(settings: VerifierSettings, place: Place | None = None) -> None:
    """Load the model, measure the step, serve until a signal.

    Args:
        place: rank 0's, where the model is divided among a group.

    Raises:
        ModelError: the model cannot be loaded.
        EngineLost: another rank of the group is gone.
        SettingsError: an address cannot be bound.
    """
    instance_id = begin(settings, Role.VERIFIER)
    thread, (model_dir, engine) = load_on_thread(lambda: load_engine(settings, place))
    redis = GuardedRedis(settings.redis_url)
    verifier = Verifier(settings, engine, read_tokenizer(model_dir), redis, instance_id, thread)
    server = server_of(verifier)
    try:
        await verifier.start()
        await serve_until_stopped(
            settings,
            Role.VERIFIER,
            instance_id,
            server,
            redis,
            verifier.metrics.registry,
            verifier.drain,
            engine.info.name,
        )
    finally:
        await verifier.close()
        engine.close()
