"""How requests end: finished, cut, refused, handed over, or broken."""

from __future__ import annotations

from collections.abc import Iterable

import structlog

from treecast.engine.base import PoolUsage
from treecast.errors import DeadlineExceeded, HandedOver, TreecastError
from treecast.sampling.stops import FinishReason, Stop
from treecast.wire.frames import Completed, Failed

from .assignments import Assignments
from .metrics.requests import RequestMetrics
from .requests import Request, Roster
from .schedule import State
from .sessions import SessionStore
from .spans import RequestSpans
from .swapping import SwapSpace

HANDED_OVER = "the verifier is draining and has handed the request over"

log = structlog.get_logger()


class Endings:
    """Takes requests out of the roster, each once, and tells their routers why."""

    def __init__(
        self,
        roster: Roster,
        sessions: SessionStore,
        swap: SwapSpace,
        assignments: Assignments,
        metrics: RequestMetrics,
        spans: RequestSpans,
    ) -> None:
        self._roster = roster
        self._sessions = sessions
        self._swap = swap
        self._assignments = assignments
        self._metrics = metrics
        self._spans = spans

    def reap(self, usage: PoolUsage, max_running: int) -> None:
        """End those that were cancelled or handed over, or are too late."""
        for request in list(self._roster):
            if request.cancelled:
                self.finish(request, Stop(FinishReason.CANCELLED))
            elif request.expired and request.state is State.WAITING:
                self._leave(request)
                self._refuse(request, self._too_late(request, usage, max_running))
            elif request.expired:
                self.finish(request, Stop(FinishReason.DEADLINE))
            elif request.handed_over:
                self._leave(request)
                self._refuse(request, HandedOver(HANDED_OVER))

    def finish(self, request: Request, stop: Stop) -> None:
        """End a request with its output; its session keeps what was computed."""
        self._leave(request)
        outcome = stop.reason.name.lower()
        self._metrics.ended.labels(outcome).inc()
        self._spans.ended(request, outcome)
        request.link.send(
            Completed(request.start.handle, stop.reason, request.usage(), stop.characters)
        )
        request.on_end()

    def fail(self, requests: Iterable[Request], error: Exception) -> None:
        """The forward broke: the requests in it end with an error, everyone else goes on."""
        broken = list(requests)
        log.error("step.failed", exc_info=error, requests=len(broken))
        for request in broken:
            self.abandon(request, TreecastError("the step failed; see the verifier's log"))

    def abandon(self, request: Request, error: TreecastError) -> None:
        """End a running request with an error; its KV is not to be trusted."""
        self._roster.remove(request)
        self._assignments.release(request)
        self._sessions.discard(request)
        self._refuse(request, error)

    def _leave(self, request: Request) -> None:
        """Take it out; its session keeps what was computed, if that is in the pool."""
        self._roster.remove(request)
        self._assignments.release(request)
        self._swap.discard(request)
        self._sessions.close(request, self._roster.begun)

    def _refuse(self, request: Request, error: TreecastError) -> None:
        outcome = error.reason.lower()
        self._metrics.ended.labels(outcome).inc()
        self._spans.ended(request, outcome, outcome)
        request.link.send(Failed(request.start.handle, error))
        request.on_end()

    def _too_late(self, request: Request, usage: PoolUsage, max_running: int) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"deadline of {request.start.deadline_ms} ms passed while the request waited for room; "
            f"{len(self._roster.running)} of {max_running} requests are running, "
            f"{usage.free} of {usage.total} KV pages are free"
        )
