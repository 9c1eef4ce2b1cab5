"""A router as a whole: built from settings, started, drained, stopped."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Self

import structlog

from treecast.telemetry.logs import configure_logs
from treecast.telemetry.metrics import serve_metrics
from treecast.v1 import router_pb2_grpc
from treecast.wire.frames import Role
from treecast.wire.guarded_redis import GuardedRedis
from treecast.wire.registry import Registry
from treecast.wire.server import Server

from .fleet import Fleet
from .leases import Leases
from .metrics import RouterMetrics
from .server import RouterService
from .settings import RouterSettings

STOP_GRACE_S = 1.0

log = structlog.get_logger()


class Router:
    """One router in this process; an async context manager.

    It is ready, by `grpc.health.v1`, while at least one healthy verifier takes new requests: a
    router that can only refuse should get no traffic. Calls that come all the same wait for a
    verifier as long as the grace period lasts.

    Attributes:
        address, metrics_address: as bound; empty before `start`.
    """

    def __init__(self, settings: RouterSettings) -> None:
        """Binds nothing yet.

        Raises:
            SettingsError: a seed or the Redis address is malformed.
        """
        self.instance_id = f"router-{secrets.token_hex(6)}"
        self.address = self.metrics_address = ""
        self.metrics = RouterMetrics()
        self._settings = settings
        self.fleet = Fleet(self.instance_id)
        self._redis = GuardedRedis(settings.redis_url)
        self._registry = Registry(self._redis, Role.VERIFIER, settings.verifiers)
        leases = Leases(self._redis, settings.lease_ttl_s)
        self.service = RouterService(
            settings, self.fleet, leases, lambda: self.redis_ok, self.metrics
        )
        self._server = Server()
        self._stop_metrics: Callable[[], None] = lambda: None
        self._health: asyncio.Task[None] | None = None

    @property
    def redis_ok(self) -> bool:
        """False while sessions are placed by hash, because Redis was not given or is lost."""
        return self._redis.ok

    async def start(self) -> None:
        """Raises SettingsError: an address cannot be bound."""
        name = "treecast.v1.RouterService"
        self._server.add(router_pb2_grpc.add_RouterServiceServicer_to_server, self.service, name)
        self.address = await self._server.listen(self._settings.listen)
        self._measure()
        await self._registry.start(self.fleet.follow)
        if not self._redis.ok:
            log.warning("router.no_redis", affinity="by hash", seeds=self._settings.verifiers)
        self._health = asyncio.create_task(self._keep_health())

    def _measure(self) -> None:
        self.metrics.redis_up.set_function(lambda: float(self.redis_ok))
        self.metrics.streams.set_function(lambda: float(len(self.fleet.candidates())))
        if self._settings.metrics_listen:
            self.metrics_address, self._stop_metrics = serve_metrics(
                self.metrics.registry, self._settings.metrics_listen
            )

    async def drain(self) -> None:
        """Take no new requests and wait for those that run, as long as the settings allow."""
        self.service.draining = True
        await self._server.set_not_ready()
        await self.service.wait_idle(self._settings.drain_s)

    async def close(self) -> None:
        """Stop at once. Safe to repeat."""
        if self._health is not None:
            self._health.cancel()
            with suppress(asyncio.CancelledError):
                await self._health
        await self._server.stop(STOP_GRACE_S if self.service.draining else None)
        await self._registry.close()
        await self.fleet.close()
        await self._redis.close()
        self._stop_metrics()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def _keep_health(self) -> None:
        ready = False

        def differs() -> bool | None:
            now = bool(self.fleet.open_hellos()) and not self.service.draining
            return None if now == ready else True

        while True:
            if await self.fleet.until(differs, timeout_s=1.0):
                ready = not ready
                await (self._server.set_ready() if ready else self._server.set_not_ready())


async def serve(settings: RouterSettings) -> None:
    """Run a router until SIGTERM or SIGINT, then drain it.

    Raises:
        SettingsError: a value is malformed, or an address cannot be bound.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    router = Router(settings)
    configure_logs("router", router.instance_id, settings.log_level, settings.log_json)
    async with router:
        log.info("router.started", address=router.address, metrics=router.metrics_address)
        if settings.announce:
            announce(router)
        await stop.wait()
        log.info("router.draining")
        await router.drain()


def announce(router: Router) -> None:
    """One line of JSON on stdout, for whoever started this process."""
    line = {
        "role": "router",
        "address": router.address,
        "metrics": router.metrics_address or None,
    }
    print(json.dumps(line), flush=True)  # noqa: T201
