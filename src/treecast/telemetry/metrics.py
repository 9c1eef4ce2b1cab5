"""Serving Prometheus metrics; each service defines its own in its `metrics.py`.

Names are `treecast_<noun>_<unit>[_total]`, the help text says the convention, labels are bounded.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, start_http_server

from treecast.address import parse_address
from treecast.errors import SettingsError

LATENCY_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
"""From a toy step to a long request."""


def serve_metrics(registry: CollectorRegistry, listen: str) -> tuple[str, Callable[[], None]]:
    """Serve `/metrics` from a thread.

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

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return str(address.with_port(server.server_port)), stop
