"""From start to stop: what every service does around its own work."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Self, TypeVar

import structlog
from prometheus_client import CollectorRegistry

from treecast.address import parse_address
from treecast.errors import TreecastError
from treecast.heap import settle_heap
from treecast.settings import ServiceSettings, unknown_variables
from treecast.telemetry.logs import configure_logs
from treecast.telemetry.metrics import serve_metrics
from treecast.wire.frames import Role
from treecast.wire.guarded_redis import GuardedRedis
from treecast.wire.registry import Registration
from treecast.wire.server import Server

SettingsT = TypeVar("SettingsT", bound=ServiceSettings)

STOP_GRACE_S = 1.0
"""For the last answers of a service that has drained."""

LIVE_S = 1.0
"""An event loop that is silent for longer counts as hung."""

log = structlog.get_logger()


def run_service(
    role: Role,
    settings: type[SettingsT],
    serve: Callable[[SettingsT], Coroutine[object, object, None]],
    argv: Sequence[str] | None,
) -> int:
    """A service's `main`: read settings (None: the command line's), serve until told to stop.

    Returns:
        The exit code: 2, after a line on stderr, for bad settings or a model that cannot be had.
    """
    name = f"treecast-{role.name.lower()}"
    arguments = sys.argv[1:] if argv is None else argv
    try:
        with suppress(KeyboardInterrupt):
            asyncio.run(serve(settings.load(arguments, name)))
    except TreecastError as error:
        print(f"{name}: {error.message}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


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
    """Serve what is ready from the start; once told to stop, drain it. Closes `redis`.

    Raises:
        SettingsError: an address cannot be bound.
    """
    try:
        async with Presence(settings, role, instance_id, server, redis, metrics, model) as presence:
            await server.set_ready()
            await presence.until_stopped()
            await presence.leave()
            await drain()
    finally:
        await redis.close()
        log.info("service.stopped")


class Presence:
    """How others find and reach this process: gRPC server, `/metrics`, entry in the registry.

    An async context manager. Redis stays the caller's, to be closed after this.

    Attributes:
        server: made ready by whoever knows that the service is.
        address: as others reach it; empty before `start`, as is `metrics_address`.
        further: other addresses to announce, by what is served there.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        role: Role,
        instance_id: str,
        server: Server,
        redis: GuardedRedis,
        metrics: CollectorRegistry,
        model: str = "",
    ) -> None:
        """Binds nothing yet."""
        self.server = server
        self.address = self.metrics_address = ""
        self.further: dict[str, str] = {}
        self._settings = settings
        self._role = role
        self._instance_id = instance_id
        self._redis = redis
        self._metrics = metrics
        redis.measure(metrics)
        self._model = model
        self._stop_metrics: Callable[[], None] = lambda: None
        self._registration: Registration | None = None
        self._left = False

    async def start(self) -> None:
        """Listen and register.

        Raises:
            SettingsError: an address cannot be bound.
        """
        settings = self._settings
        bound = await self.server.listen(settings.listen)
        self.address = _advertised(settings.advertise) if settings.advertise else bound
        if settings.metrics_listen:
            probes = {
                "/ready": lambda: self.server.ready,
                "/live": loop_answers(asyncio.get_running_loop()),
            }
            self.metrics_address, self._stop_metrics = serve_metrics(
                self._metrics, settings.metrics_listen, probes
            )
        self._registration = Registration(
            self._redis, self._role, self.address, self._instance_id, self._model
        )
        await self._registration.start()

    async def until_stopped(self) -> None:
        """Announce this process, then wait for SIGTERM or SIGINT."""
        stopped = stop_signal()
        settle_heap()
        log.info("service.started", address=self.address, metrics=self.metrics_address)
        if self._settings.announce:
            self._announce()
        await stopped.wait()
        log.info("service.draining")

    async def leave(self) -> None:
        """Be found by nobody new: not ready, out of the registry. Safe to repeat."""
        self._left = True
        await self.server.set_not_ready()
        if self._registration is not None:
            await self._registration.close()

    async def close(self) -> None:
        """Stop at once, or with a second's grace after `leave`. Safe to repeat."""
        grace_s = STOP_GRACE_S if self._left else None
        await self.leave()
        await self.server.stop(grace_s)
        self._stop_metrics()
        self._stop_metrics = lambda: None

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def _announce(self) -> None:
        """One line of JSON on stdout, for whoever started this process."""
        line = {
            "role": self._role.name.lower(),
            "address": self.address,
            "metrics": self.metrics_address,
            "instance_id": self._instance_id,
            "pid": os.getpid(),
            **self.further,
        }
        print(json.dumps(line), file=sys.stdout, flush=True)  # noqa: T201


def _advertised(text: str) -> str:
    """As it is dialled: an IPv6 host in brackets, which `$(POD_IP):7071` comes without.

    Raises:
        SettingsError: it is not HOST:PORT, or its port is 0.
    """
    return str(parse_address(text, "advertise", lowest_port=1))


def loop_answers(loop: asyncio.AbstractEventLoop) -> Callable[[], bool]:
    """Whether the event loop gets round to a call within a second; asked from another thread."""

    def ask() -> bool:
        answered = threading.Event()
        loop.call_soon_threadsafe(answered.set)
        return answered.wait(LIVE_S)

    return ask


def stop_signal() -> asyncio.Event:
    """Set at SIGTERM or SIGINT, from now on, on the running event loop."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped
