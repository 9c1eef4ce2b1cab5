"""RouterService: what clients call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import structlog

from treecast.errors import (
    Cancelled,
    DeadlineExceeded,
    DuplicateRequest,
    InvalidRequest,
    NotServed,
    PromptTooLong,
    TreecastError,
    Unavailable,
)
from treecast.v1 import router_pb2 as pb
from treecast.v1 import router_pb2_grpc, verifier_pb2
from treecast.wire.frames import Hello, SessionKey
from treecast.wire.guarded_redis import RedisLost
from treecast.wire.status import from_rpc_error

from .dispatch import Dispatcher
from .fleet import Fleet, Verifier
from .generation import Generation, Job
from .leases import Leases, epoch_without_redis
from .messages import Ask, ChatPrompt, Prompt, TextPrompt, check_id, parse_ask
from .metrics import RouterMetrics
from .placement import choose_model
from .sessions import (
    TENANT,
    LeasedSession,
    NoSession,
    SampleSession,
    Session,
    lease_name,
)
from .settings import RouterSettings
from .text import ModelText, TextCache, TokenizerFiles

DEADLINE_ROUNDING = 0.01
"""gRPC rounds a timeout up on the wire by as much as this share of it."""

TOKENIZER_TIMEOUT_S = 10.0
LOAD_TIMEOUT_S = 0.5

Context = grpc.aio.ServicerContext[Any, Any]

log = structlog.get_logger()


class RouterService(router_pb2_grpc.RouterServiceServicer):
    """The RPCs over one fleet. `draining` is set once, at the end: no new requests then."""

    def __init__(
        self,
        settings: RouterSettings,
        fleet: Fleet,
        leases: Leases,
        redis_ok: Callable[[], bool],
        metrics: RouterMetrics,
    ) -> None:
        self.draining = False
        self._settings = settings
        self._fleet = fleet
        self._leases = leases
        self._redis_ok = redis_ok
        self._metrics = metrics
        self._dispatcher = Dispatcher(
            fleet, settings.queue_limit, settings.verifier_grace_s, metrics
        )
        self._texts = TextCache()
        self._running: dict[str, asyncio.Timeout] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return self._dispatcher.num_waiting

    async def wait_idle(self, timeout_s: float) -> None:
        """Until no request runs any more, or the time is up."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("router.drain_incomplete", running=len(self._running))

    # --- Generate -----------------------------------------------------------------------------

    async def Generate(  # type: ignore[override]  # the stubs know generators only
        self, request: pb.GenerateRequest, context: Context
    ) -> None:
        """Write a request's events. Its outcome is counted once, whatever it is."""
        outcome = "client_gone"
        try:
            outcome = await self._generate(request, context)
        except TreecastError as error:
            outcome = error.reason.lower()
            raise
        except Exception:
            outcome = "internal"
            raise
        finally:
            self._metrics.requests.labels(outcome).inc()

    async def _generate(self, request: pb.GenerateRequest, context: Context) -> str:
        if self.draining:
            raise Unavailable("router is draining")
        ask = parse_ask(request)
        if ask.request_id in self._running:
            raise DuplicateRequest(f"request {ask.request_id!r} is running")
        scope = asyncio.timeout(None)  # an abort lets it expire
        self._enter(ask.request_id, scope)
        try:
            async with scope:
                reason = await self._serve(ask, context)
        except TimeoutError:
            if not scope.expired():
                raise
            raise Cancelled(f"request {ask.request_id!r} was aborted") from None
        finally:
            self._exit(ask.request_id)
        return reason

    def _enter(self, request_id: str, scope: asyncio.Timeout) -> None:
        self._running[request_id] = scope
        self._metrics.running.inc()
        self._idle.clear()

    def _exit(self, request_id: str) -> None:
        del self._running[request_id]
        self._metrics.running.dec()
        if not self._running:
            self._idle.set()

    async def _serve(self, ask: Ask, context: Context) -> str:
        arrived_s = asyncio.get_running_loop().time()
        deadline_s = self._deadline(context, arrived_s)
        model = await self._find_model(ask, deadline_s)
        text = await self._texts.get(
            model.model, model.model_revision, lambda: self._fetch_tokenizer(model)
        )
        prompt = await asyncio.to_thread(encode, ask.prompt, text)
        check_tokens(ask, prompt, model)
        job = Job(
            ask=ask,
            prompt=prompt,
            model=model,
            session=self._session(ask),
            deadline_s=deadline_s,
            arrived_s=arrived_s,
            detokenizer=lambda: text.detokenizer(ask.sampling.stop),
            write=_writer(context),
        )
        limit = self._settings.max_placements
        reason = await Generation(job, self._dispatcher, limit, self._metrics).run()
        return reason.name.lower()

    def _deadline(self, context: Context, now_s: float) -> float | None:
        """Ahead of the client's own, so that the last event still gets there."""
        left_s = context.time_remaining()
        if left_s is None:
            return None
        margin_s = self._settings.deadline_margin_s + DEADLINE_ROUNDING * left_s
        return now_s + max(left_s / 2, left_s - margin_s)

    async def _find_model(self, ask: Ask, deadline_s: float | None) -> Hello:
        """Raises Unavailable if no verifier is there for the grace period."""

        def look() -> Hello | None:
            hellos = self._fleet.open_hellos()
            return choose_model(ask.model, ask.revision, hellos, self._fleet.models_seen)

        loop = asyncio.get_running_loop()
        grace_s = self._settings.verifier_grace_s
        wait_s = grace_s if deadline_s is None else min(grace_s, deadline_s - loop.time())
        model = await self._fleet.until(look, wait_s)
        if model is None and wait_s < grace_s:
            raise DeadlineExceeded("deadline passed while the request waited for a verifier")
        if model is None:
            raise Unavailable(f"no verifier is available; waited {grace_s:g} s")
        self._check_law(ask, model)
        return model

    def _check_law(self, ask: Ask, model: Hello) -> None:
        hellos = self._fleet.open_hellos()
        served = {law for hello in hellos if same_model(hello, model) for law in hello.laws}
        if ask.law not in served:
            names = ", ".join(sorted(law.name.lower() for law in served))
            raise NotServed(
                f"law {ask.law.name.lower()} is not served by model {model.model!r}; "
                f"served: {names}"
            )

    async def _fetch_tokenizer(self, model: Hello) -> TokenizerFiles:
        """Ask the verifiers of this revision, one after the other, until one answers."""
        request = verifier_pb2.GetTokenizerRequest(model_revision=model.model_revision)
        problem: TreecastError = Unavailable("no verifier is available")
        for verifier in self._fleet.verifiers:
            candidate = verifier.candidate
            if candidate is None or not same_model(candidate.hello, model):
                continue
            try:
                files = await verifier.stub.GetTokenizer(request, timeout=TOKENIZER_TIMEOUT_S)
            except grpc.RpcError as error:
                problem = from_rpc_error(error)
                continue
            return TokenizerFiles(
                files.tokenizer_json, files.chat_template, dict(files.special_tokens)
            )
        raise Unavailable(f"tokenizer of model {model.model!r} cannot be fetched: {problem}")

    def _session(self, ask: Ask) -> Session:
        if ask.session_id is not None:
            return LeasedSession(self._leases, ask.session_id)
        if ask.num_samples > 1:
            return SampleSession(ask.request_id, self._fleet.forget)
        return NoSession()

    # --- the other RPCs -----------------------------------------------------------------------

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """Ends the request's stream with CANCELLED, wherever it is."""
        scope = self._running.get(request.request_id)
        if scope is None or scope.expired():
            return pb.AbortResponse(aborted=False)
        scope.reschedule(asyncio.get_running_loop().time())
        return pb.AbortResponse(aborted=True)

    async def CloseSession(
        self, request: pb.CloseSessionRequest, context: Context
    ) -> pb.CloseSessionResponse:
        """Without Redis nobody knows the holder, so every verifier is told."""
        check_id("session_id", request.session_id)
        try:
            lease = await self._leases.release(lease_name(request.session_id))
        except RedisLost:
            return pb.CloseSessionResponse(closed=self._forget_everywhere(request.session_id))
        if lease is not None:
            key = SessionKey(TENANT, request.session_id, lease.epoch)
            self._fleet.forget(lease.holder, key)
        return pb.CloseSessionResponse(closed=lease is not None)

    def _forget_everywhere(self, session_id: str) -> bool:
        key = SessionKey(TENANT, session_id, epoch_without_redis())
        instances = [candidate.instance_id for candidate in self._fleet.candidates()]
        for instance_id in instances:
            self._fleet.forget(instance_id, key)
        return bool(instances)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """One entry for each revision that takes new requests."""
        models: dict[tuple[str, str], pb.Model] = {}
        for hello in self._fleet.open_hellos():
            model = models.setdefault(
                (hello.model, hello.model_revision),
                pb.Model(
                    name=hello.model,
                    revision=hello.model_revision,
                    vocab_size=hello.vocab_size,
                    context_tokens=hello.context_tokens,
                ),
            )
            model.verifiers += 1
        return pb.ListModelsResponse(models=[models[key] for key in sorted(models)])

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: Context
    ) -> pb.GetStatusResponse:
        """All verifiers that are dialed, those that do not answer included."""
        statuses = await asyncio.gather(*map(_status, self._fleet.verifiers))
        return pb.GetStatusResponse(
            verifiers=statuses,
            queued=self.num_waiting,
            running=max(0, len(self._running) - self.num_waiting),
            redis_ok=self._redis_ok(),
        )


def _writer(context: Context) -> Callable[[pb.GenerateResponse], Awaitable[None]]:
    """Samples of one request share its stream, which takes one message at a time."""
    turn = asyncio.Lock()

    async def write(response: pb.GenerateResponse) -> None:
        async with turn:
            await context.write(response)

    return write


def encode(prompt: Prompt, text: ModelText) -> tuple[int, ...]:
    """A prompt's tokens. Long texts take milliseconds, so not for an event loop."""
    match prompt:
        case TextPrompt():
            return text.encode_text(prompt.text)
        case ChatPrompt():
            return text.encode_chat(prompt.messages)
    return prompt.ids


def check_tokens(ask: Ask, prompt: tuple[int, ...], model: Hello) -> None:
    """What can be checked once the model is known; the verifier has the last word.

    Raises:
        InvalidRequest: an unknown token id.
        PromptTooLong: the prompt alone is longer than the context.
    """
    ask.sampling.check_vocabulary(model.vocab_size)
    for token in (*prompt, *ask.committed):
        if token >= model.vocab_size:
            raise InvalidRequest(
                f"token id {token} is unknown; the vocabulary has {model.vocab_size}"
            )
    if len(prompt) > model.context_tokens and not ask.truncate_prompt:
        raise PromptTooLong(f"prompt has {len(prompt)} tokens; the limit is {model.context_tokens}")


def same_model(one: Hello, other: Hello) -> bool:
    return (one.model, one.model_revision) == (other.model, other.model_revision)


async def _status(verifier: Verifier) -> pb.VerifierStatus:
    candidate = verifier.candidate
    if candidate is None:
        return pb.VerifierStatus(address=verifier.address, healthy=False)
    hello, beat = candidate.hello, candidate.beat
    return pb.VerifierStatus(
        address=verifier.address,
        healthy=True,
        instance_id=hello.instance_id,
        model=hello.model,
        model_revision=hello.model_revision,
        running=beat.running,
        waiting=beat.waiting,
        kv_pages_free=beat.kv_pages_free,
        kv_pages_total=beat.kv_pages_total,
        speculators=await _speculators(verifier),
        numerics_fingerprint=hello.fingerprint,
    )


async def _speculators(verifier: Verifier) -> list[str]:
    try:
        load = await verifier.stub.GetLoad(verifier_pb2.GetLoadRequest(), timeout=LOAD_TIMEOUT_S)
    except grpc.RpcError as error:
        log.warning("verifier.no_load", address=verifier.address, why=str(from_rpc_error(error)))
        return []
    return list(load.speculators)
