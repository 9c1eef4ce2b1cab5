"""Serving Prometheus metrics; each service defines its own, in `metrics`.

Names are `treecast_<noun>_<unit>[_total]`, the help text says the convention, labels are bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server

from treecast.address import parse_address
from treecast.errors import SettingsError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""From a toy step to a long request."""

Probes = Mapping[str, Callable[[], bool]]
"""By path: whether it is answered with 200 or 503. Called on a thread of the HTTP server."""


def serve_metrics(
    registry: CollectorRegistry, listen: str, probes: Probes
) -> tuple[str, Callable[[], None]]:
    """Serve `/metrics` and the probes from a thread.

    Probes by HTTP are for whoever cannot ask `grpc.health.v1`: kubelets do not speak TLS to it.

    Returns:
        The bound address and a function that stops serving.
    Raises:
        SettingsError: the address is malformed or in use.
    """
    address = parse_address(listen, "metrics_listen")
    try:
        server, thread = start_http_server(address.port, addr=address.host, registry=registry)
    except OSError as error:
        raise SettingsError(f"metrics_listen {listen} cannot be bound: {error.strerror}") from error
    server.set_app(_with_probes(make_wsgi_app(registry), probes))

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return str(address.with_port(server.server_port)), stop


def _with_probes(metrics: WSGIApplication, probes: Probes) -> WSGIApplication:
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        probe = probes.get(environ["PATH_INFO"])
        if probe is None:
            return metrics(environ, start_response)
        good = probe()
        status = "200 OK" if good else "503 Service Unavailable"
        start_response(status, [("Content-Type", "text/plain")])
        return [b"yes\n" if good else b"no\n"]

    return answer
