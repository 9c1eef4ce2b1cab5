"""Redis that may be slow or gone: each command has a short timeout, and a breaker.

While Redis is lost the first caller waits one timeout; those after it are refused at once until a
pause has passed and one of them may try again. So its loss costs nobody more than one wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

import structlog
from prometheus_client import CollectorRegistry, Gauge, Histogram
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError

from treecast.errors import SettingsError
from treecast.wire.breaker import Breaker

T = TypeVar("T")
log = structlog.get_logger()

CLUSTER = "+cluster"
"""Marks the scheme of a Redis Cluster's URL, that of any of its nodes: redis+cluster://host."""
_COMMAND_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)

TIMEOUT_S = 0.25
FIRST_TIMEOUT_S = 2.0
PAUSE_S = 1.0


class RedisLost(Exception):
    """Redis does not answer, or was not given. The caller goes on without it."""


class GuardedRedis:
    """A process's client of one Redis; `None` as its address is a Redis that is always lost.

    Shared by all that asks Redis, so that its loss is met, and logged, once.
    """

    def __init__(
        self,
        url: str | None,
        timeout_s: float = TIMEOUT_S,
        pause_s: float = PAUSE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connects to nothing yet.

        Raises:
            SettingsError: the address is not a Redis URL.
        """
        self._redis = _client(url, timeout_s) if url else None
        self._timeout_s = timeout_s
        self._breaker = Breaker(1, pause_s, clock)
        self._answers: bool | None = None
        self._observe: Callable[[float], object] = lambda seconds: None

    def measure(self, registry: CollectorRegistry) -> None:
        """Export how it fares; nothing where no Redis was given. Once per registry."""
        if self._redis is None:
            return
        up = Gauge(
            "treecast_redis_up",
            "1 while Redis answers this process; absent where none was given.",
            registry=registry,
        )
        up.set_function(lambda: float(self.ok))
        self._observe = Histogram(
            "treecast_redis_command_seconds",
            "From a command to its answer, or to giving it up.",
            buckets=_COMMAND_BUCKETS_S,
            registry=registry,
        ).observe

    @property
    def ok(self) -> bool:
        """Whether the last command was answered; False before the first."""
        return self._answers is True

    async def ask(self, command: Callable[[Redis], Awaitable[T]]) -> T:
        """Run one command (or pipeline).

        Raises:
            RedisLost: no answer within the timeout, or the breaker is open. Whether the command
                took effect is unknown.
        """
        if self._redis is None or not self._breaker.allows:
            raise RedisLost
        self._breaker.trying()
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self._patience_s):
                answer = await command(self._redis)
        except (RedisError, RedisClusterException, OSError, TimeoutError) as error:
            self._lost(error)
            raise RedisLost from error
        finally:
            self._observe(time.perf_counter() - began)
        self._answered()
        return answer

    @property
    def _patience_s(self) -> float:
        """A cluster's client learns who is there before its first command."""
        first = self._answers is None and isinstance(self._redis, RedisCluster)
        return max(self._timeout_s, FIRST_TIMEOUT_S) if first else self._timeout_s

    def _lost(self, error: Exception) -> None:
        self._breaker.failed()
        if self._answers is not False:
            log.warning("redis lost", error=repr(error))
        self._answers = False

    def _answered(self) -> None:
        self._breaker.succeeded()
        if self._answers is False:
            log.info("redis is back")
        self._answers = True

    async def close(self) -> None:
        if self._redis is not None:
            await self._redis.aclose()


def _client(url: str, timeout_s: float) -> Redis:
    """A client of one server, or of a cluster: the commands are the same."""
    plain, is_cluster = url, False
    for scheme in ("redis", "rediss"):
        if url.startswith(f"{scheme}{CLUSTER}://"):
            plain, is_cluster = url.replace(CLUSTER, "", 1), True
    try:
        if is_cluster:
            return _cluster(plain, timeout_s)
        return Redis.from_url(
            plain,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )
    except ValueError as error:
        raise SettingsError(f"redis_url is {redacted(url)!r}: {error}") from None


def _cluster(url: str, timeout_s: float) -> Redis:
    client = RedisCluster.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        decode_responses=True,
    )
    return cast(Redis, client)


def redacted(url: str) -> str:
    """A URL as it may be shown: without user and password."""
    scheme, slashes, rest = url.partition("://")
    place = rest.rpartition("@")[2]
    return f"{scheme}{slashes}***@{place}" if place != rest else url
