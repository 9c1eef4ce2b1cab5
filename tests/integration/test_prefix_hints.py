"""Hints of prefixes in a real Valkey server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from treecast.services.router.prefixes import Prefixes
from treecast.wire.guarded_redis import GuardedRedis

PROMPT = range(1000)


@pytest.fixture
async def redis(empty_redis: str) -> AsyncIterator[GuardedRedis]:
    client = GuardedRedis(empty_redis, timeout_s=2.0)
    yield client
    await client.close()


async def test_holders_come_longest_beginning_first(redis: GuardedRedis) -> None:
    prefixes = Prefixes(redis, ttl_s=60)
    await prefixes.note("t", PROMPT, "long")
    await prefixes.note("t", PROMPT[:130], "short")
    assert await prefixes.find("t", PROMPT) == ("long", "short")
    assert await prefixes.find("t", [*PROMPT[:200], 7]) == ("long", "short")
    assert await prefixes.find("t", [*PROMPT[:150], 7]) == ("short",)
    assert await prefixes.find("t", PROMPT[:63]) == ()
    assert await prefixes.find("rival", PROMPT) == ()


async def test_hints_end_by_themselves_and_have_a_hash_tag_each(redis: GuardedRedis) -> None:
    await Prefixes(redis, ttl_s=60).note("t", PROMPT, "v1")
    keys = await redis.ask(lambda client: client.keys("*"))
    assert len(keys) == 7  # 1, 2, 3, 4, 6, 8 and 12 of 15 blocks, and no text in any name
    for key in keys:
        assert key.startswith("treecast:prefix:{")
        assert key.endswith("}")
        left_ms = await redis.ask(lambda client, key=key: client.pttl(key))
        assert 59_000 < left_ms <= 60_000


async def test_nobody_is_known_when_redis_is_lost() -> None:
    prefixes = Prefixes(GuardedRedis(None), ttl_s=60)
    await prefixes.note("t", PROMPT, "v1")
    assert await prefixes.find("t", PROMPT) == ()
