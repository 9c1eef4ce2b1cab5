"""A collector of spans on a real port: OTLP over gRPC, as the standard's own protos say."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Received:
    """One span, with who sent it."""

    service: str
    instance: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    began_ns: int
    ended_ns: int
    attributes: dict[str, Any]
    failed: bool


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Attributes: endpoint: for `--otlp-endpoint`; spans: all that came."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.spans: list[Received] = []

    async def Export(self, request: Any, context: Any) -> Any:
        for resource in request.resource_spans:
            facts = _values(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.spans += [_received(facts, span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str, service: str = "") -> list[Received]:
        """In the order of time."""
        found = [span for span in self.spans if span.name == name and service in span.service]
        return sorted(found, key=lambda span: span.began_ns)


def _received(facts: dict[str, Any], span: Any) -> Received:
    return Received(
        facts["service.name"],
        facts["service.instance.id"],
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _values(span.attributes),
        span.status.code == span.status.STATUS_CODE_ERROR,
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """Receive on a port of its own."""
    receiver = Receiver()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    receiver.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield receiver
    finally:
        await server.stop(0)
