"""A router as a whole: built from settings, started, drained, stopped."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

import structlog

from treecast.errors import SettingsError
from treecast.telemetry.process import ProcessCollector
from treecast.telemetry.traces import open_tracing
from treecast.v1 import router_pb2_grpc
from treecast.wire.frames import Role
from treecast.wire.guarded_redis import GuardedRedis
from treecast.wire.lifecycle import Presence, begin
from treecast.wire.registry import Registry
from treecast.wire.server import Server
from treecast.wire.tls import Tls, tls_of

from .draining import Draining
from .fleet import Fleet
from .keys import KeyRing
from .leases import Leases
from .metrics import RouterMetrics
from .prefixes import Prefixes
from .quotas import Quotas
from .service import RouterService
from .settings import RouterSettings

if TYPE_CHECKING:
    from .edge import HttpListener

log = structlog.get_logger()


class Router:
    """One router in this process; an async context manager.

    It is ready, by `grpc.health.v1`, from its first verifier on until it drains. A later gap is
    bridged by the queue, and whoever waits in it too long gets an error that says when to retry.

    Attributes:
        presence: its server, `/metrics` and entry in the registry.
        http: its OpenAI-compatible edge, if there is one.
    """

    def __init__(self, settings: RouterSettings, instance_id: str) -> None:
        """Binds nothing yet.

        Raises:
            SettingsError: a seed or the Redis address is malformed, an extra is missing that
                the HTTP edge or the spans need, or the queue's order needs a predictor.
        """
        check_order(settings)
        self.metrics = RouterMetrics()
        self._tracing = open_tracing(settings.otlp_endpoint, "router", instance_id)
        tls = tls_of(settings)
        self.fleet = Fleet(instance_id, tls)
        self._draining = Draining(self.fleet, self._set_serving)
        self._settings = settings
        self._redis = GuardedRedis(settings.redis_url)
        self._registry = Registry(self._redis, Role.VERIFIER, settings.verifiers)
        leases = Leases(self._redis, settings.lease_ttl_s)
        self.service = RouterService(
            settings,
            self.fleet,
            leases,
            Prefixes(self._redis, settings.lease_ttl_s),
            KeyRing(settings.api_keys_file, settings.api_keys),
            Quotas(self._redis),
            self._draining,
            lambda: self.redis_ok,
            self.metrics,
            self._tracing,
        )
        server = Server(tls=tls, require_clients=settings.tls_clients == "certificate")
        self.metrics.registry.register(
            ProcessCollector(
                "router", lambda: tuple(self.fleet.models_seen), lambda: self.service.draining
            )
        )
        self.presence = Presence(
            settings, Role.ROUTER, instance_id, server, self._redis, self.metrics.registry
        )
        self.http = open_edge(self.service, settings, tls) if settings.http_listen else None
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
            callers=["client"],
        )
        self.metrics.streams.set_function(lambda: float(len(self.fleet.candidates())))
        await self.presence.start()
        if self.http is not None:
            self.presence.further["http"] = await self.http.start()
        await self._registry.start(self.fleet.follow)
        if not self.redis_ok:
            log.warning("router.no_redis", affinity="by hash", seeds=self._settings.verifiers)
        await self._set_serving(True)

    async def _set_serving(self, serving: bool) -> None:
        """Be ready once a verifier is there, or not at all."""
        await self._forget_first_verifier()
        if serving:
            self._first_verifier = asyncio.create_task(self._await_first_verifier())
        else:
            await self.presence.server.set_not_ready()

    async def _await_first_verifier(self) -> None:
        await self.fleet.until(lambda: bool(self.fleet.open_hellos()) or None, timeout_s=None)
        await self.presence.server.set_ready()

    async def drain(self) -> None:
        """Take no new requests and wait for those that run, as long as the settings allow."""
        await self._draining.stop()
        await self.presence.leave()
        await self.service.wait_idle(self._settings.drain_s)

    async def close(self) -> None:
        """Stop at once. Safe to repeat."""
        await self._forget_first_verifier()
        if self.http is not None:
            await self.http.close()
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


def check_order(settings: RouterSettings) -> None:
    """Raises SettingsError: the queue goes by lengths that nobody guesses."""
    if settings.queue_order == "shortest" and settings.length_predictor == "none":
        raise SettingsError(
            "--queue-order is 'shortest' and --length-predictor is 'none'; it needs 'history' or "
            "'max-tokens'"
        )


def open_edge(service: RouterService, settings: RouterSettings, tls: Tls | None) -> HttpListener:
    """The HTTP edge, whose packages are imported only where it is wanted.

    Raises:
        SettingsError: they are not installed, or there is no certificate to show.
    """
    listen = settings.http_listen or ""
    try:
        from .edge import http_edge
    except ImportError as error:
        raise SettingsError(
            f"--http-listen is {listen!r} and {error.name} is not installed; install treecast[http]"
        ) from error
    context = tls.http_context(settings.tls_clients == "certificate") if tls else None
    return http_edge(service, listen, context)


async def serve(settings: RouterSettings) -> None:
    """Run a router until SIGTERM or SIGINT, then drain it.

    Raises:
        SettingsError: a value is malformed, or an address cannot be bound.
    """
    async with Router(settings, begin(settings, Role.ROUTER)) as router:
        await router.presence.until_stopped()
        await router.drain()
    log.info("service.stopped")
