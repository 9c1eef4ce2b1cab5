"""Quotas against a real Valkey server, and without one."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from treecast.errors import InvalidRequest, QuotaExceeded
from treecast.services.router.keys import Key
from treecast.services.router.quotas import PERIOD_S, TAKE, Bucket, Quotas
from treecast.wire.guarded_redis import GuardedRedis

from ..conftest import LocalRedis

KEY = Key(tenant="acme", sha256="a" * 64, requests_per_minute=3, tokens_per_minute=600)
OTHER = Key(tenant="other", sha256="b" * 64, requests_per_minute=3)


@pytest.fixture
async def redis(empty_redis: str) -> AsyncIterator[GuardedRedis]:
    client = GuardedRedis(empty_redis)
    yield client
    await client.close()


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


async def take_all(*quotas: Quotas, key: Key = KEY) -> int:
    """Requests granted in turn until one is refused."""
    for count in range(100):
        try:
            await quotas[count % len(quotas)].take_request(key)
        except QuotaExceeded:
            return count
    raise AssertionError("no bound")


async def test_routers_share_a_bound_when_redis_answers(redis: GuardedRedis) -> None:
    assert await take_all(Quotas(redis), Quotas(redis)) == 3
    assert await take_all(Quotas(redis), key=OTHER) == 3


async def test_refusal_names_tenant_bound_and_wait(redis: GuardedRedis) -> None:
    quotas = Quotas(redis)
    await take_all(quotas)
    with pytest.raises(QuotaExceeded, match=r"^tenant 'acme' has used its 3 requests per") as full:
        await quotas.take_request(KEY)
    assert 19 < full.value.retry_after_s <= 20  # three a minute: the next in 20 s


@pytest.mark.parametrize("with_redis", [True, False])
async def test_tokens_that_were_not_spent_are_given_back(
    redis: GuardedRedis, with_redis: bool
) -> None:
    quotas = Quotas(redis if with_redis else GuardedRedis(None))
    async with quotas.tokens(KEY, 600, lambda: 100):
        with pytest.raises(QuotaExceeded, match=r"^tenant 'acme' has used its 600 tokens per"):
            await take_tokens(quotas, 600)
    await take_tokens(quotas, 500)
    with pytest.raises(QuotaExceeded):
        await take_tokens(quotas, 500)


async def take_tokens(quotas: Quotas, cost: int) -> None:
    async with quotas.tokens(KEY, cost, lambda: cost):
        pass


async def test_request_is_refused_for_good_when_it_can_never_fit(redis: GuardedRedis) -> None:
    with pytest.raises(InvalidRequest, match=r"up to 601 tokens; tenant 'acme' has 600 tokens per"):
        async with Quotas(redis).tokens(KEY, 601, lambda: 0):
            pass


async def test_local_bound_holds_when_redis_is_lost(own_redis: LocalRedis) -> None:
    redis, clock = GuardedRedis(own_redis.url), Clock()
    quotas = Quotas(redis, clock)
    await quotas.take_request(KEY)
    own_redis.kill()
    assert await take_all(quotas) == 2  # the one before was counted here too
    clock.now_s += PERIOD_S / 3
    assert await take_all(quotas) == 1
    await redis.close()


async def test_redis_and_the_process_agree_on_what_a_bucket_grants(redis: GuardedRedis) -> None:
    """The oracle of the script, with time standing still: 40 ms at most pass here."""
    clock = Clock()
    bucket = Bucket(1000, clock)
    for cost in (300, 300, 500, 300, -200, 250, 100, 1):
        ours = bucket.take(cost)
        theirs = await redis.ask(lambda it, c=cost: it.eval(TAKE, 1, "k", 1000, c, 3_600_000))
        assert (ours > 0) == (int(str(theirs)) > 0), cost


async def test_full_bucket_expires(redis: GuardedRedis) -> None:
    quotas = Quotas(redis)
    await quotas.take_request(KEY)
    name = "treecast:quota:{aaaaaaaaaaaaaaaa}:requests"
    left_ms = int(str(await redis.ask(lambda it: it.pttl(name))))
    assert 20_000 < left_ms <= 21_000  # a third of a minute until it is full, and a second


async def test_concurrency_is_bounded_per_key() -> None:
    quotas, key = Quotas(GuardedRedis(None)), Key(tenant="acme", max_concurrency=2)
    with quotas.running(key), quotas.running(key):
        message = r"^tenant 'acme' has 2 requests running; the limit is 2$"
        with pytest.raises(QuotaExceeded, match=message) as full, quotas.running(key):
            pass
        assert full.value.retry_after_s == 1
    with quotas.running(key):
        pass
