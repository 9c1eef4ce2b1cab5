"""From start to stop: what every service does around its own work."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable

import structlog
from prometheus_client import CollectorRegistry

from treecast.settings import ServiceSettings, unknown_variables
from treecast.telemetry.logs import configure_logs
from treecast.telemetry.metrics import serve_metrics
from treecast.wire.frames import Role
from treecast.wire.guarded_redis import GuardedRedis
from treecast.wire.registry import Registration
from treecast.wire.server import Server

log = structlog.get_logger()


def begin(settings: ServiceSettings, role: Role) -> str:
    """Set up logs and name this process; returns its instance id."""
    name = role.name.lower()
    instance_id = f"{name}-{os.getpid()}-{secrets.token_hex(4)}"
    configure_logs(name, instance_id, settings.log_level, settings.log_json)
    if unknown := unknown_variables(type(settings)):
        log.warning("settings.unknown_variables", names=unknown)
    return instance_id


async def serve_until_stopped(
    settings: ServiceSettings,
    role: Role,
    instance_id: str,
    server: Server,
    redis: GuardedRedis,
    metrics: CollectorRegistry,
    drain: Callable[[], Awaitable[None]],
    model: str = "",
) -> None:
    """Listen, register, announce; on SIGTERM or SIGINT leave the registry, drain and stop.

    Raises:
        SettingsError: an address cannot be bound.
    """
    stopped = stop_signal()
    address = await server.listen(settings.listen)
    advertised = settings.advertise or address
    metrics_address, stop_metrics = _serve_metrics(settings, metrics)
    try:
        registration = Registration(redis, role, advertised, instance_id, model)
        async with registration:
            await server.set_ready()
            log.info("service.ready", address=address, advertised=advertised)
            if settings.announce:
                announce(role, advertised, metrics_address, instance_id)
            await stopped.wait()
            await server.set_not_ready()
        log.info("service.draining")
        await drain()
        await server.stop(grace_s=1.0)
    finally:
        await redis.close()
        stop_metrics()
        log.info("service.stopped")


def stop_signal() -> asyncio.Event:
    """Set at SIGTERM or SIGINT, from now on, on the running event loop."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


def _serve_metrics(
    settings: ServiceSettings, metrics: CollectorRegistry
) -> tuple[str, Callable[[], None]]:
    if not settings.metrics_listen:
        return "", lambda: None
    return serve_metrics(metrics, settings.metrics_listen)


def announce(role: Role, address: str, metrics_address: str, instance_id: str) -> None:
    """One line of JSON on stdout, for whoever started this process."""
    line = {
        "role": role.name.lower(),
        "address": address,
        "metrics": metrics_address,
        "instance_id": instance_id,
        "pid": os.getpid(),
    }
    print(json.dumps(line), file=sys.stdout, flush=True)  # noqa: T201
