"""Where texts that begin alike were computed: a hint in Redis, by the names of their beginnings.

A request without a session's lease goes where most of its prompt's beginning lies, if that verifier
is not much busier than the others; verifiers share the pages of common prefixes. A wrong hint costs
a prefill, so nothing here is waited for longer than Redis' short timeout, and nothing is locked.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from redis.asyncio import Redis

from treecast.prefix import PAGE_TOKENS, prefix_names
from treecast.wire.guarded_redis import GuardedRedis, RedisLost

MAX_NAMES = 12
"""Beginnings that are looked up: 1, 2, 3, 4, 6, 8, 12, .. blocks, up to 4096 tokens."""


class Prefixes:
    """The hints of all routers. `redis` stays the caller's."""

    def __init__(self, redis: GuardedRedis, ttl_s: float) -> None:
        """Hints last as long as idle sessions keep their KV, `ttl_s`, since they were last used."""
        self._redis = redis
        self._ttl_ms = round(ttl_s * 1000)

    async def find(self, salt: str, prompt: Sequence[int]) -> tuple[str, ...]:
        """Instances that computed beginnings of this prompt, the longest first; safe to retry.

        Nobody if Redis is lost. `salt` is of `adapter.prefix_salt`.
        """
        keys = keys_of(salt, prompt)
        if not keys:
            return ()

        async def read(redis: Redis) -> list[str | None]:
            async with redis.pipeline(transaction=False) as pipeline:
                for key in reversed(keys):
                    pipeline.get(key)
                return await pipeline.execute()

        try:
            found = await self._redis.ask(read)
        except RedisLost:
            return ()
        return tuple(dict.fromkeys(holder for holder in found if holder))

    async def note(self, salt: str, prompt: Sequence[int], holder: str) -> None:
        """A verifier is computing this prompt. Lost with Redis; safe to retry."""
        keys = keys_of(salt, prompt)
        if not keys:
            return

        async def write(redis: Redis) -> None:
            async with redis.pipeline(transaction=False) as pipeline:
                for key in keys:
                    pipeline.set(key, holder, px=self._ttl_ms)
                await pipeline.execute()

        try:
            await self._redis.ask(write)
        except RedisLost:
            return


def keys_of(salt: str, prompt: Sequence[int]) -> list[str]:
    """One key for each beginning that is looked up, the shortest first; each with its hash tag."""
    counts = _counts()
    names = prefix_names(salt, prompt[: counts[-1] * PAGE_TOKENS], PAGE_TOKENS)
    found = (names[count - 1] for count in counts if count <= len(names))
    return [f"treecast:prefix:{{{name.hex()}}}" for name in found]


def _counts() -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ..: steps of a third to a half, so that few names are close."""
    doubled = (2**power * part // 2 for power in range(1, 8) for part in (2, 3))
    return list(islice(sorted({1, *doubled}), MAX_NAMES))
