"""What each key may use: token buckets shared by all routers through Redis, and a local bound.

A bucket holds one minute's worth and refills evenly. A request takes one from the first, and from
the second its prompt and the most it may output; what it did not output goes back at its end.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Literal

from treecast.errors import InvalidRequest, QuotaExceeded
from treecast.wire.guarded_redis import GuardedRedis, RedisLost

from .keys import Key

Unit = Literal["requests", "tokens"]

PERIOD_S = 60.0
CONCURRENCY_RETRY_S = 1.0

TAKE = """
local capacity, cost = tonumber(ARGV[1]), tonumber(ARGV[2])
local period_ms = tonumber(ARGV[3])
local now = redis.call('TIME')
local now_ms = now[1] * 1000 + now[2] / 1000
local stored = redis.call('HMGET', KEYS[1], 'level', 'at_ms')
local level, at_ms = tonumber(stored[1]) or capacity, tonumber(stored[2]) or now_ms
level = math.min(capacity, level + math.max(0, now_ms - at_ms) * capacity / period_ms)
if cost > level then
  return math.ceil((cost - level) * period_ms / capacity)
end
level = math.min(capacity, level - cost)
redis.call('HSET', KEYS[1], 'level', string.format('%.6f', level), 'at_ms',
           string.format('%.3f', now_ms))
redis.call('PEXPIRE', KEYS[1], math.ceil((capacity - level) * period_ms / capacity) + 1000)
return 0
"""
"""KEYS: the bucket. ARGV: its capacity, what to take (below 0: to give back), the period in ms.

Returns 0 if it was taken, else the milliseconds until there is enough, with nothing taken. A bucket
that is full again is as good as none, so it expires.
"""


class Bucket:
    """The same within this process."""

    def __init__(self, capacity: int, clock: Callable[[], float]) -> None:
        self.capacity = capacity
        self._clock = clock
        self._level = float(capacity)
        self._at_s = clock()

    def take(self, cost: int) -> float:
        """Returns 0 if it was taken, else the seconds until there is enough."""
        level = self._refilled()
        if cost > level:
            return (cost - level) * PERIOD_S / self.capacity
        self._level = min(self.capacity, level - cost)
        return 0.0

    def charge(self, cost: int) -> None:
        """Take what was granted elsewhere, as far as it is there."""
        self._level = min(self.capacity, max(0.0, self._refilled() - cost))

    def _refilled(self) -> float:
        now_s = self._clock()
        elapsed_s, self._at_s = now_s - self._at_s, now_s
        self._level = min(self.capacity, self._level + elapsed_s * self.capacity / PERIOD_S)
        return self._level


class Quotas:
    """Counts what keys use. `redis` stays the caller's. Event loop only."""

    def __init__(self, redis: GuardedRedis, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis = redis
        self._clock = clock
        self._running: Counter[str] = Counter()
        self._buckets: dict[tuple[str, Unit], Bucket] = {}

    @contextmanager
    def running(self, key: Key) -> Iterator[None]:
        """Count a request while it runs.

        Raises:
            QuotaExceeded: too many of the key's run through this router.
        """
        count, limit = self._running[key.name], key.max_concurrency
        if limit is not None and count >= limit:
            raise QuotaExceeded(
                f"tenant {key.tenant!r} has {count} requests running; the limit is {limit}",
                CONCURRENCY_RETRY_S,
            )
        self._running[key.name] += 1
        try:
            yield
        finally:
            self._running[key.name] -= 1
            if not self._running[key.name]:
                del self._running[key.name]

    async def take_request(self, key: Key) -> None:
        """Raises QuotaExceeded: the key's requests of this minute are used up."""
        await self._take(key, "requests", key.requests_per_minute, 1)

    @asynccontextmanager
    async def tokens(self, key: Key, cost: int, spent: Callable[[], int]) -> AsyncIterator[None]:
        """Take the tokens that a request may need at most, and give back what it has not `spent`.

        Raises:
            InvalidRequest: more than the key's limit at once.
            QuotaExceeded: more than is left of it now.
        """
        limit = key.tokens_per_minute
        if limit is not None and cost > limit:
            raise InvalidRequest(
                f"prompt and output of the request are up to {cost} tokens; "
                f"tenant {key.tenant!r} has {limit} tokens per minute"
            )
        await self._take(key, "tokens", limit, cost)
        try:
            yield
        finally:
            await self._take(key, "tokens", limit, min(0, spent() - cost))

    async def _take(self, key: Key, unit: Unit, limit: int | None, cost: int) -> None:
        if limit is None or cost == 0:
            return
        bucket = self._bucket(key, unit, limit)
        try:
            wait_s = await self._take_shared(key, unit, limit, cost)
        except RedisLost:
            wait_s = bucket.take(cost)
        else:
            if not wait_s:
                bucket.charge(cost)
        if wait_s:
            raise QuotaExceeded(
                f"tenant {key.tenant!r} has used its {limit} {unit} per minute; "
                f"{cost} more in {wait_s:.1f} s",
                wait_s,
            )

    async def _take_shared(self, key: Key, unit: Unit, limit: int, cost: int) -> float:
        """Seconds to wait; 0 once it is taken. Raises RedisLost."""
        name, period_ms = _bucket_key(key, unit), round(1000 * PERIOD_S)
        wait_ms = await self._redis.ask(
            lambda redis: redis.eval(TAKE, 1, name, limit, cost, period_ms)
        )
        return int(str(wait_ms)) / 1000

    def _bucket(self, key: Key, unit: Unit, limit: int) -> Bucket:
        bucket = self._buckets.get((key.name, unit))
        if bucket is None or bucket.capacity != limit:
            bucket = self._buckets[key.name, unit] = Bucket(limit, self._clock)
        return bucket


def _bucket_key(key: Key, unit: Unit) -> str:
    return f"treecast:quota:{{{key.name}}}:{unit}"
