"""A router as a whole: built from settings, started, drained, stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self

import structlog

from treecast.telemetry.metrics import serve_metrics
from treecast.v1 import router_pb2_grpc
from treecast.wire.frames import Role
from treecast.wire.guarded_redis import GuardedRedis
from treecast.wire.lifecycle import announce, begin, stop_signal
from treecast.wire.registry import Registration, Registry
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

    It is ready, by `grpc.health.v1`, from its first verifier on until it drains. A later gap is
    bridged by the queue, and whoever waits in it too long gets an error that says when to retry.

    Attributes:
        address: as others reach it; empty before `start`, as is `metrics_address`.
    """

    def __init__(self, settings: RouterSettings, instance_id: str) -> None:
        """Binds nothing yet.

        Raises:
            SettingsError: a seed or the Redis address is malformed.
        """
        self.instance_id = instance_id
        self.address = self.metrics_address = ""
        self.metrics = RouterMetrics()
        self.fleet = Fleet(instance_id)
        self._settings = settings
        self._redis = GuardedRedis(settings.redis_url)
        self._registry = Registry(self._redis, Role.VERIFIER, settings.verifiers)
        self._registration: Registration | None = None
        leases = Leases(self._redis, settings.lease_ttl_s)
        self.service = RouterService(
            settings, self.fleet, leases, lambda: self.redis_ok, self.metrics
        )
        self._server = Server()
        self._stop_metrics: Callable[[], None] = lambda: None
        self._first_verifier: asyncio.Task[None] | None = None

    @property
    def redis_ok(self) -> bool:
        """False while sessions are placed by hash, because Redis was not given or is lost."""
        return self._redis.ok

    async def start(self) -> None:
        """Raises SettingsError: an address cannot be bound."""
        name = "treecast.v1.RouterService"
        self._server.add(router_pb2_grpc.add_RouterServiceServicer_to_server, self.service, name)
        bound = await self._server.listen(self._settings.listen)
        self.address = self._settings.advertise or bound
        self._measure()
        await self._registry.start(self.fleet.follow)
        if not self.redis_ok:
            log.warning("router.no_redis", affinity="by hash", seeds=self._settings.verifiers)
        self._registration = Registration(self._redis, Role.ROUTER, self.address, self.instance_id)
        await self._registration.start()
        self._first_verifier = asyncio.create_task(self._await_first_verifier())

    def _measure(self) -> None:
        self.metrics.redis_up.set_function(lambda: float(self.redis_ok))
        self.metrics.streams.set_function(lambda: float(len(self.fleet.candidates())))
        if self._settings.metrics_listen:
            self.metrics_address, self._stop_metrics = serve_metrics(
                self.metrics.registry, self._settings.metrics_listen
            )

    async def _await_first_verifier(self) -> None:
        await self.fleet.until(lambda: bool(self.fleet.open_hellos()) or None, timeout_s=None)
        await self._server.set_ready()

    async def drain(self) -> None:
        """Take no new requests and wait for those that run, as long as the settings allow."""
        self.service.draining = True
        await self._stop_being_found()
        await self._server.set_not_ready()
        await self.service.wait_idle(self._settings.drain_s)

    async def close(self) -> None:
        """Stop at once. Safe to repeat."""
        await self._stop_being_found()
        await self._server.stop(STOP_GRACE_S if self.service.draining else None)
        await self._registry.close()
        await self.fleet.close()
        await self._redis.close()
        self._stop_metrics()

    async def _stop_being_found(self) -> None:
        if self._first_verifier is not None:
            self._first_verifier.cancel()
            await asyncio.gather(self._first_verifier, return_exceptions=True)
        if self._registration is not None:
            await self._registration.close()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()


async def serve(settings: RouterSettings) -> None:
    """Run a router until SIGTERM or SIGINT, then drain it.

    Raises:
        SettingsError: a value is malformed, or an address cannot be bound.
    """
    stopped = stop_signal()
    async with Router(settings, begin(settings, Role.ROUTER)) as router:
        log.info("service.started", address=router.address, metrics=router.metrics_address)
        if settings.announce:
            announce(Role.ROUTER, router.address, router.metrics_address, router.instance_id)
        await stopped.wait()
        log.info("service.draining")
        await router.drain()
    log.info("service.stopped")
