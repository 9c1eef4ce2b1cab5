"""Tracing by OpenTelemetry's SDK; imported only when it is on."""

from __future__ import annotations

import time

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from treecast.telemetry.traces import Attributes

_EXPORT_TIMEOUT_S = 3
_SEND_EVERY_MS = 1000

_PROPAGATOR = TraceContextTextMapPropagator()


class OtlpSpan:
    """A span that is being recorded."""

    def __init__(self, span: Span) -> None:
        self._span = span
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, set_span_in_context(span))
        self.traceparent = carrier.get("traceparent", "")

    def note(self, attributes: Attributes) -> None:
        self._span.set_attributes(dict(attributes))

    def end(self, error: str = "") -> None:
        if not self._span.is_recording():
            return
        if error:
            self._span.set_status(StatusCode.ERROR, error)
        self._span.end()


class OtlpTracing:
    """Spans to a collector, in batches from a thread of their own.

    A collector that is slow or gone costs spans, never a request: the queue is bounded. Who calls
    decides about sampling; without a caller's context all requests are recorded.
    """

    on = True

    def __init__(self, endpoint: str, role: str, instance_id: str) -> None:
        """A provider of our own: several services may live in one process."""
        resource = Resource(
            {"service.name": f"treecast-{role}", "service.instance.id": instance_id}
        )
        exporter = OTLPSpanExporter(
            endpoint, insecure=endpoint.startswith("http://"), timeout=_EXPORT_TIMEOUT_S
        )
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter, schedule_delay_millis=_SEND_EVERY_MS)
        )
        self._closed = False
        self._tracer = self._provider.get_tracer("treecast")

    def begin(self, name: str, traceparent: str) -> OtlpSpan:
        context = _context(traceparent)
        return OtlpSpan(self._tracer.start_span(name, context, SpanKind.SERVER))

    def record(
        self, name: str, traceparent: str, began_s: float, ended_s: float, attributes: Attributes
    ) -> None:
        if not traceparent:
            return
        span = self._tracer.start_span(
            name, _context(traceparent), attributes=dict(attributes), start_time=_epoch_ns(began_s)
        )
        span.end(_epoch_ns(ended_s))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._provider.shutdown()


def _context(traceparent: str) -> Context:
    return _PROPAGATOR.extract({"traceparent": traceparent}, Context())


def _epoch_ns(monotonic_s: float) -> int:
    return time.time_ns() - round(1e9 * (time.monotonic() - monotonic_s))
