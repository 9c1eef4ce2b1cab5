"""RouterService: what clients call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import structlog

from treecast.errors import Cancelled, DuplicateRequest, TreecastError, Unavailable
from treecast.telemetry.traces import Span, Tracing, valid_traceparent
from treecast.v1 import router_pb2 as pb
from treecast.v1 import router_pb2_grpc
from treecast.wire.frames import SessionKey
from treecast.wire.guarded_redis import RedisLost

from .admission import Admission
from .dispatch import Dispatcher
from .fleet import Fleet
from .generation import Generation, Job
from .leases import Leases, epoch_without_redis
from .messages import Ask, check_id, parse_ask
from .metrics import RouterMetrics
from .sessions import (
    TENANT,
    LeasedSession,
    NoSession,
    SampleSession,
    Session,
    lease_name,
)
from .settings import RouterSettings
from .status import models_of, status_of

DEADLINE_ROUNDING = 0.01
"""gRPC rounds a timeout up on the wire by as much as this share of it."""

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
        tracing: Tracing,
    ) -> None:
        self.draining = False
        self._settings = settings
        self._fleet = fleet
        self._leases = leases
        self._redis_ok = redis_ok
        self._metrics = metrics
        self._tracing = tracing
        self._dispatcher = Dispatcher(
            fleet, settings.queue_limit, settings.verifier_grace_s, metrics
        )
        self._admission = Admission(fleet, settings.verifier_grace_s)
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
        outcome, error = "client_gone", "client_gone"
        span = self._tracing.begin("treecast.request", _traceparent(context))
        try:
            outcome, error = await self._generate(request, context, span), ""
        except TreecastError as failure:
            outcome = error = failure.reason.lower()
            raise
        except Exception:
            outcome = error = "internal"
            raise
        finally:
            self._metrics.requests.labels(outcome).inc()
            span.note({"treecast.outcome": outcome})
            span.end(error)

    async def _generate(self, request: pb.GenerateRequest, context: Context, span: Span) -> str:
        if self.draining:
            raise Unavailable("router is draining")
        ask = parse_ask(request)
        if ask.request_id in self._running:
            raise DuplicateRequest(f"request {ask.request_id!r} is running")
        scope = asyncio.timeout(None)  # an abort lets it expire
        self._enter(ask.request_id, scope)
        try:
            async with scope:
                reason = await self._serve(ask, context, span)
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

    async def _serve(self, ask: Ask, context: Context, span: Span) -> str:
        arrived_s = asyncio.get_running_loop().time()
        deadline_s = self._deadline(context, arrived_s)
        checked = await self._admission.check(ask, deadline_s)
        job = Job(
            ask=ask,
            prompt=checked.prompt,
            model=checked.model,
            session=self._session(ask),
            deadline_s=deadline_s,
            arrived_s=arrived_s,
            detokenizer=lambda: checked.text.detokenizer(ask.sampling.stop),
            token_text=checked.text.token_text,
            write=_writer(context),
            span=span,
        )
        limit = self._settings.max_placements
        generation = Generation(job, self._dispatcher, limit, self._metrics, self._tracing)
        reason = await generation.run()
        return reason.name.lower()

    def _deadline(self, context: Context, now_s: float) -> float | None:
        """Ahead of the client's own, so that the last event still gets there."""
        left_s = context.time_remaining()
        if left_s is None:
            return None
        margin_s = self._settings.deadline_margin_s + DEADLINE_ROUNDING * left_s
        return now_s + max(left_s / 2, left_s - margin_s)

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
        return pb.ListModelsResponse(models=models_of(self._fleet.open_hellos()))

    async def GetStatus(
        self, request: pb.GetStatusRequest, context: Context
    ) -> pb.GetStatusResponse:
        """All verifiers that are dialed, those that do not answer included."""
        statuses = await asyncio.gather(*map(status_of, self._fleet.verifiers))
        return pb.GetStatusResponse(
            verifiers=statuses,
            queued=self.num_waiting,
            running=max(0, len(self._running) - self.num_waiting),
            redis_ok=self._redis_ok(),
        )


def _traceparent(context: Context) -> str:
    """The caller's trace, from the call's metadata."""
    metadata = context.invocation_metadata() or ()
    found = (value for key, value in metadata if key == "traceparent")
    return valid_traceparent(next(found, None))


def _writer(context: Context) -> Callable[[pb.GenerateResponse], Awaitable[None]]:
    """Samples of one request share its stream, which takes one message at a time."""
    turn = asyncio.Lock()

    async def write(response: pb.GenerateResponse) -> None:
        async with turn:
            await context.write(response)

    return write
