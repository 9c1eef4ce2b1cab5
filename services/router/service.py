"""RouterService: what clients call, of one router."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog

from treecast.errors import Cancelled, DuplicateRequest, TreecastError
from treecast.telemetry.traces import Span, Tracing, valid_traceparent
from treecast.v1 import router_pb2 as pb
from treecast.v1 import router_pb2_grpc
from treecast.wire.frames import SessionKey
from treecast.wire.guarded_redis import RedisLost

from .admission import Admission, Checked
from .dispatch import Dispatcher
from .draining import Draining
from .fleet import Fleet
from .generation import Generation, Job
from .keys import Key, KeyRing
from .leases import Leases, epoch_without_redis
from .lengths import Expected, predictor_of
from .messages import Ask, check_id, parse_ask
from .metrics import Caller, RouterMetrics
from .prefixes import Prefixes
from .queue import Share, rank_of
from .quotas import Quotas
from .sessions import (
    LeasedSession,
    NoSession,
    SampleSession,
    Session,
    lease_name,
)
from .settings import RouterSettings
from .status import models_of, status_of
from .text import ModelText
from .turnstile import Turnstile
from .writer import Write, Writer

DEADLINE_ROUNDING = 0.01
"""gRPC rounds a timeout up on the wire by as much as this share of it."""

Context = grpc.aio.ServicerContext[Any, Any]
RequestName = tuple[str, str]
"""A tenant's request id: tenants choose theirs without knowing of one another."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Call:
    """What an edge, gRPC or HTTP, says of one call beside its request.

    Attributes:
        write: takes each event, one at a time, and waits while the client is slow.
        left_s: seconds until the client's deadline; None for none.
        traceparent: W3C trace context of the caller; empty for none.
        authorization: the call's `authorization` metadata or header, such as "Bearer KEY".
        arrived_s: now, in time of the event loop.
    """

    write: Write
    left_s: float | None = None
    traceparent: str = ""
    authorization: str | None = field(default=None, repr=False)
    arrived_s: float = field(default_factory=lambda: asyncio.get_running_loop().time())


class ClientGone(Cancelled):
    """A write found that nobody reads any more."""


class RouterService(router_pb2_grpc.RouterServiceServicer):
    """The RPCs over one fleet."""

    def __init__(
        self,
        settings: RouterSettings,
        fleet: Fleet,
        leases: Leases,
        prefixes: Prefixes,
        keys: KeyRing,
        quotas: Quotas,
        draining: Draining,
        redis_ok: Callable[[], bool],
        metrics: RouterMetrics,
        tracing: Tracing,
    ) -> None:
        self._draining = draining
        self._settings = settings
        self._fleet = fleet
        self._leases = leases
        self._prefixes = prefixes
        self._keys = keys
        self._quotas = quotas
        self._redis_ok = redis_ok
        self._metrics = metrics
        self._tracing = tracing
        self._dispatcher = Dispatcher(
            fleet, settings.queue_limit, settings.verifier_grace_s, metrics
        )
        self._admission = Admission(fleet, settings.verifier_grace_s)
        self._turnstile = Turnstile()
        self._lengths = predictor_of(settings.length_predictor)
        self._running: dict[RequestName, asyncio.Timeout] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def draining(self) -> bool:
        """Whether it takes no new requests."""
        return self._draining.active

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
        """Write a request's events."""
        call = Call(
            _writer(context),
            context.time_remaining(),
            valid_traceparent(_metadata(context, "traceparent")),
            _metadata(context, "authorization"),
        )
        await self.generate(request, call)

    async def generate(self, request: pb.GenerateRequest, call: Call) -> None:
        """Serve one request, whichever edge it came by, and count its outcome once.

        Cancel it when the client is gone.

        Raises:
            TreecastError: what ended the request.
        """
        outcome = error = "client_gone"
        caller, span = Caller(), self._tracing.begin("treecast.request", call.traceparent)
        try:
            outcome, error = await self._generate(request, call, caller, span), ""
        except ClientGone:
            raise
        except TreecastError as failure:
            outcome = error = failure.reason.lower()
            raise
        except Exception:
            outcome = error = "internal"
            raise
        finally:
            self._metrics.requests.labels(outcome, caller.tenant, caller.model).inc()
            span.note({"treecast.outcome": outcome})
            span.end(error)

    async def _generate(
        self, request: pb.GenerateRequest, call: Call, caller: Caller, span: Span
    ) -> str:
        await self._turnstile.enter()
        key = self._keys.caller(call.authorization)
        caller.tenant = key.tenant
        self._draining.check()
        ask = parse_ask(request)
        key.check_priority(ask.priority)
        name = (key.tenant, ask.request_id)
        if name in self._running:
            raise DuplicateRequest(f"request {ask.request_id!r} is running")
        scope = asyncio.timeout(None)  # an abort lets it expire
        self._enter(name, scope)
        try:
            async with scope:
                with self._quotas.running(key):
                    await self._quotas.take_request(key)
                    reason = await self._serve(ask, key, call, caller, span)
        except TimeoutError:
            if not scope.expired():
                raise
            raise Cancelled(f"request {ask.request_id!r} was aborted") from None
        finally:
            self._exit(name)
        return reason

    def _caller(self, context: Context) -> Key:
        """Who calls; raises Unauthenticated for nobody that we know."""
        return self._keys.caller(_metadata(context, "authorization"))

    def _enter(self, name: RequestName, scope: asyncio.Timeout) -> None:
        self._running[name] = scope
        self._metrics.running.inc()
        self._idle.clear()

    def _exit(self, name: RequestName) -> None:
        del self._running[name]
        self._metrics.running.dec()
        if not self._running:
            self._idle.set()

    async def _serve(self, ask: Ask, key: Key, call: Call, caller: Caller, span: Span) -> str:
        loop = asyncio.get_running_loop()
        deadline_s = self._deadline(call)
        checked = await self._admission.check(ask, deadline_s)
        await self._turnstile.enter()
        caller.model = checked.model.model
        cost = ask.largest_cost(len(checked.prompt))
        expected = self._expect(ask, caller, checked)
        job = Job(
            ask=ask,
            share=Share(key.tenant, ask.priority, cost, self._rank(ask, expected, loop.time())),
            expected=expected,
            caller=caller,
            prompt=checked.prompt,
            model=checked.model,
            adapter=checked.adapter,
            session=self._session(ask, key.tenant),
            deadline_s=deadline_s,
            arrived_s=call.arrived_s,
            detokenizer=lambda: checked.text.detokenizer(ask.sampling.stop),
            token_text=lambda token: checked.text.token(token).text,
            writer=Writer(call.write),
            span=span,
        )
        limit = self._settings.max_placements
        generation = Generation(
            job,
            self._dispatcher,
            self._prefixes,
            self._lengths,
            self._turnstile,
            limit,
            self._metrics,
            self._tracing,
        )
        async with self._quotas.tokens(key, cost, lambda: generation.spent):
            reason = await generation.run()
        duration = self._metrics.duration.labels(caller.tenant, caller.model)
        duration.observe(loop.time() - call.arrived_s)
        return reason.name.lower()

    def _expect(self, ask: Ask, caller: Caller, checked: Checked) -> Expected | None:
        whose = (caller.tenant, caller.model, checked.adapter.name if checked.adapter else "")
        expected = self._lengths.expect(whose, checked.prompt, ask.sampling)
        if expected is not None:
            self._metrics.length_guesses.labels(expected.source.value).inc()
        return expected

    def _rank(self, ask: Ask, expected: Expected | None, now_s: float) -> float:
        left = expected.left(len(ask.committed)) if expected else None
        settings = self._settings
        return rank_of(settings.queue_order, now_s, left, settings.queue_give_way_s)

    def _deadline(self, call: Call) -> float | None:
        """Ahead of the client's own, so that the last event still gets there."""
        if call.left_s is None:
            return None
        margin_s = self._settings.deadline_margin_s + DEADLINE_ROUNDING * call.left_s
        return call.arrived_s + max(call.left_s / 2, call.left_s - margin_s)

    def _session(self, ask: Ask, tenant: str) -> Session:
        if ask.session_id is not None:
            return LeasedSession(self._leases, tenant, ask.session_id)
        if ask.num_samples > 1:
            return SampleSession(tenant, ask.request_id, self._fleet.forget)
        return NoSession()

    # --- the other RPCs -----------------------------------------------------------------------

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """Ends a request of the caller's tenant with CANCELLED, wherever it is, once it has been
        taken up.
        """
        scope = self._running.get((self._caller(context).tenant, request.request_id))
        if scope is None or scope.expired():
            return pb.AbortResponse(aborted=False)
        scope.reschedule(asyncio.get_running_loop().time())
        return pb.AbortResponse(aborted=True)

    async def CloseSession(
        self, request: pb.CloseSessionRequest, context: Context
    ) -> pb.CloseSessionResponse:
        """Without Redis nobody knows the holder, so every verifier is told."""
        tenant = self._caller(context).tenant
        check_id("session_id", request.session_id)
        try:
            lease = await self._leases.release(lease_name(tenant, request.session_id))
        except RedisLost:
            closed = self._forget_everywhere(tenant, request.session_id)
            return pb.CloseSessionResponse(closed=closed)
        if lease is not None:
            key = SessionKey(tenant, request.session_id, lease.epoch)
            self._fleet.forget(lease.holder, key)
        return pb.CloseSessionResponse(closed=lease is not None)

    def _forget_everywhere(self, tenant: str, session_id: str) -> bool:
        key = SessionKey(tenant, session_id, epoch_without_redis())
        instances = [candidate.instance_id for candidate in self._fleet.candidates()]
        for instance_id in instances:
            self._fleet.forget(instance_id, key)
        return bool(instances)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        """One entry for each revision that takes new requests."""
        return pb.ListModelsResponse(models=self.models(_metadata(context, "authorization")))

    def models(self, authorization: str | None) -> list[pb.Model]:
        """What `ListModels` answers; raises Unauthenticated for nobody that we know."""
        self.check_key(authorization)
        return models_of(self._fleet.open_hellos())

    def check_key(self, authorization: str | None) -> None:
        """Raises Unauthenticated for nobody that we know; before a call's body is read."""
        self._keys.caller(authorization)

    def text_of(self, model: str, revision: str) -> ModelText:
        """The tokenizer of a model that a request has started with."""
        return self._admission.text_of(model, revision)

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: Context
    ) -> pb.GetStatusResponse:
        """All verifiers that are dialed, those that do not answer included."""
        self._caller(context)
        statuses = await asyncio.gather(*map(status_of, self._fleet.verifiers))
        return pb.GetStatusResponse(
            verifiers=statuses,
            queued=self.num_waiting,
            running=max(0, len(self._running) - self.num_waiting),
            redis_ok=self._redis_ok(),
            draining=self.draining,
        )

    # --- for admins ---------------------------------------------------------------------------

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        """Returns at once; `GetStatus` tells how many requests still run."""
        self._caller(context).check_admin()
        if not request.target:
            await self._draining.drain_router()
            return pb.DrainResponse(running=len(self._running))
        after_ms = request.hand_over_after_ms if request.HasField("hand_over_after_ms") else None
        running = await self._draining.drain_verifier(request.target, after_ms)
        return pb.DrainResponse(running=running)

    async def Resume(self, request: pb.ResumeRequest, context: Context) -> pb.ResumeResponse:
        """Undoes a drain; nothing to do if there was none."""
        self._caller(context).check_admin()
        if request.target:
            await self._draining.resume_verifier(request.target)
        else:
            await self._draining.resume_router()
        return pb.ResumeResponse()


def _metadata(context: Context, wanted: str) -> str | None:
    """The first value of that name; binary ones have others."""
    metadata = context.invocation_metadata() or ()
    return next((str(value) for name, value in metadata if name == wanted), None)


def _writer(context: Context) -> Write:
    async def write(response: pb.GenerateResponse) -> None:
        try:
            await context.write(response)
        except grpc.aio.InternalError:  # before gRPC has come to cancel us
            raise ClientGone("client has left") from None

    return write
