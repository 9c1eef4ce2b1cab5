"""A router as a whole: built from settings, started, drained, stopped."""

from __future__ import annotations

import asyncio
from typing import Self

import structlog

from treecast.telemetry.traces import open_tracing
from treecast.v1 import router_pb2_grpc
from treecast.wire.frames import Role
from treecast.wire.guarded_redis import GuardedRedis
from treecast.wire.lifecycle import Presence, begin
from treecast.wire.registry import Registry
from treecast.wire.server import Server

from .fleet import Fleet
from .leases import Leases
from .metrics import RouterMetrics
from .server import RouterService
from .settings import RouterSettings

log = structlog.get_logger()


class Router:
    """One router in this process; an async context manager.

    It is ready, by `grpc.health.v1`, from its first verifier on until it drains. A later gap is
    bridged by the queue, and whoever waits in it too long gets an error that says when to retry.

    Attributes:
        presence: its server, `/metrics` and entry in the registry.
    """

    def __init__(self, settings: RouterSettings, instance_id: str) -> None:
        """Binds nothing yet.

        Raises:
            SettingsError: a seed or the Redis address is malformed, or spans cannot be sent.
        """
        self.metrics = RouterMetrics()
        self._tracing = open_tracing(settings.otlp_endpoint, "router", instance_id)
        self.fleet = Fleet(instance_id)
        self._settings = settings
        self._redis = GuardedRedis(settings.redis_url)
        self._registry = Registry(self._redis, Role.VERIFIER, settings.verifiers)
        leases = Leases(self._redis, settings.lease_ttl_s)
        self.service = RouterService(
            settings, self.fleet, leases, lambda: self.redis_ok, self.metrics, self._tracing
        )
        self.presence = Presence(
            settings, Role.ROUTER, instance_id, Server(), self._redis, self.metrics.registry
        )
        self._first_verifier: asyncio.Task[None] | None = None

    @property
    def redis_ok(self) -> bool:
        """False while sessions are placed by hash, because Redis was not given or is lost."""
        return self._redis.ok

    @property
    def address(self) -> str:
        """As others reach it; empty before `start`."""
        return self.presence.address

    async def start(self) -> None:
        """Raises SettingsError: an address cannot be bound."""
        self.presence.server.add(
            router_pb2_grpc.add_RouterServiceServicer_to_server,
            self.service,
            "treecast.v1.RouterService",
        )
        self.metrics.redis_up.set_function(lambda: float(self.redis_ok))
        self.metrics.streams.set_function(lambda: float(len(self.fleet.candidates())))
        await self.presence.start()
        await self._registry.start(self.fleet.follow)
        if not self.redis_ok:
            log.warning("router.no_redis", affinity="by hash", seeds=self._settings.verifiers)
        self._first_verifier = asyncio.create_task(self._await_first_verifier())

    async def _await_first_verifier(self) -> None:
        await self.fleet.until(lambda: bool(self.fleet.open_hellos()) or None, timeout_s=None)
        await self.presence.server.set_ready()

    async def drain(self) -> None:
        """Take no new requests and wait for those that run, as long as the settings allow."""
        self.service.draining = True
        await self._forget_first_verifier()
        await self.presence.leave()
        await self.service.wait_idle(self._settings.drain_s)

    async def close(self) -> None:
        """Stop at once. Safe to repeat."""
        await self._forget_first_verifier()
        await self.presence.close()
        await self._registry.close()
        await self.fleet.close()
        await self._redis.close()
        await asyncio.to_thread(self._tracing.close)

    async def _forget_first_verifier(self) -> None:
        if self._first_verifier is not None:
            self._first_verifier.cancel()
            await asyncio.gather(self._first_verifier, return_exceptions=True)

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
    async with Router(settings, begin(settings, Role.ROUTER)) as router:
        await router.presence.until_stopped()
        await router.drain()
    log.info("service.stopped")
