"""Leases in Redis: which verifier holds a session's KV cache, and since which epoch.

The epoch lets a verifier refuse a placement that is older than one it has seen. Redis is asked at
claim, renewal and release, never per step; when it is lost every method raises `RedisLost` and
the caller fails open.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from redis.asyncio import Redis

from treecast.wire.guarded_redis import GuardedRedis

CLAIM = """
local stored = redis.call('GET', KEYS[1])
local epoch = 0
if stored then
  epoch = tonumber(string.match(stored, '^%d+'))
end
if epoch ~= tonumber(ARGV[2]) then
  return stored
end
local now = redis.call('TIME')
local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
local claimed = string.format('%.0f', math.max(epoch + 1, now_ms)) .. ' ' .. ARGV[1]
redis.call('SET', KEYS[1], claimed, 'PX', ARGV[3])
return claimed
"""
"""KEYS: the lease. ARGV: who claims it, the epoch they saw (0: none), time to live in ms.

Compare-and-set: whoever saw the stored epoch gets a newer one; anyone else gets what is stored,
unchanged. A lease that vanished meanwhile has epoch 0: the answer is nil, and the claim is made
again.
"""


@dataclass(frozen=True, slots=True)
class Lease:
    """`holder` is the instance id of a verifier's process: a restarted one has no KV cache."""

    holder: str
    epoch: int


class Leases:
    """Leases of all sessions. `redis` stays the caller's."""

    def __init__(self, redis: GuardedRedis, ttl_s: float) -> None:
        self._redis = redis
        self._ttl_ms = round(ttl_s * 1000)

    async def renew(self, session: str) -> Lease | None:
        """The session's lease, with its time-to-live started anew. Safe to retry.

        Raises:
            RedisLost: Redis does not answer.
        """
        key = _key(session)
        return _parse(await self._redis.ask(lambda redis: redis.getex(key, px=self._ttl_ms)))

    async def claim(self, session: str, holder: str, seen: Lease | None) -> Lease:
        """Give the session to `holder`, unless someone else has claimed it since `seen`.

        Returns:
            The lease now stored: ours with a newer epoch, or the one that came before us.
        Raises:
            RedisLost: Redis does not answer.
        """
        lease: Lease | None = None
        while lease is None:
            epoch = seen.epoch if seen else 0
            lease = _parse(await self._redis.ask(self._claimer(session, holder, epoch)))
            seen = None
        return lease

    async def release(self, session: str) -> Lease | None:
        """Drop the session's lease; returns what it was.

        Raises:
            RedisLost: Redis does not answer.
        """
        return _parse(await self._redis.ask(lambda redis: redis.getdel(_key(session))))

    def _claimer(
        self, session: str, holder: str, epoch: int
    ) -> Callable[[Redis], Awaitable[str | bytes | None]]:
        return lambda redis: redis.eval(CLAIM, 1, _key(session), holder, epoch, self._ttl_ms)


def epoch_without_redis() -> int:
    """Milliseconds of the wall clock: newer than what Redis gave out, as far as clocks agree."""
    return time.time_ns() // 1_000_000


def _key(session: str) -> str:
    return f"treecast:lease:{{{session}}}"


def _parse(stored: str | bytes | None) -> Lease | None:
    """`bytes` only to redis-py's types: our client decodes."""
    if stored is None:
        return None
    epoch, _, holder = str(stored).partition(" ")
    return Lease(holder, int(epoch))
