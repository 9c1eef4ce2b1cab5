"""The caller's trace, passed on with each request.

Nothing is imported for it: a program that traces has loaded OpenTelemetry itself.
"""

from __future__ import annotations

import sys

Metadata = tuple[tuple[str, str], ...]


def caller_trace() -> Metadata:
    """W3C trace context of the span that is current now, as gRPC metadata; none outside one."""
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    traceparent = carrier.get("traceparent")
    return () if traceparent is None else (("traceparent", traceparent),)
