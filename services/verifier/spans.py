"""What a verifier tells of a request to whoever collects spans; a step pays one look at a flag."""

from __future__ import annotations

from treecast.sampling.laws import Walk
from treecast.telemetry.traces import Tracing, is_told

from .plan import Work
from .requests import Request
from .rounds import StepTimes


class RequestSpans:
    """Spans below a request's `treecast.serve`; see `telemetry/traces.py`."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    def admitted(self, request: Request) -> None:
        """It is in the batch: the wait is over."""
        if self._tracing.on:
            began, ended = request.arrived_at, request.admitted_at
            self._tracing.record("treecast.queue", request.span.traceparent, began, ended, {})

    def prefilled(self, request: Request, now: float) -> None:
        """Its first token is there."""
        if self._tracing.on:
            facts = {
                "gen_ai.usage.input_tokens": request.prompt_len,
                "treecast.cached_tokens": request.cached_tokens,
            }
            parent = request.span.traceparent
            self._tracing.record("treecast.prefill", parent, request.admitted_at, now, facts)

    def stepped(self, work: Work, walked: Walk, times: StepTimes) -> None:
        """A step brought output."""
        if not self._tracing.on:
            return
        request = work.request
        number = request.tally.steps
        if is_told(number):
            facts = {
                "treecast.step": number,
                "treecast.nodes": len(work.tree),
                "treecast.accepted": len(walked.accepted),
                "treecast.waited_ms": 1000 * (times.forward - times.began),
                "treecast.verified_ms": 1000 * (times.ended - times.forward),
            }
            parent, began = request.span.traceparent, max(times.began, request.admitted_at)
            self._tracing.record("treecast.step", parent, began, times.ended, facts)

    def ended(self, request: Request, outcome: str, error: str = "") -> None:
        """It is over."""
        if self._tracing.on:
            usage = request.usage()
            request.span.note(
                {
                    "treecast.request_id": request.start.request_id,
                    "treecast.outcome": outcome,
                    "treecast.steps": usage.steps,
                    "treecast.drafted": usage.drafted,
                    "treecast.accepted": usage.accepted,
                    "gen_ai.usage.output_tokens": usage.output_tokens,
                }
            )
            request.span.end(error)
