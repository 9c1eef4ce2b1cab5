"""Leases against a real Valkey server."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from treecast.bench.simulate.state import MemoryLeases
from treecast.errors import SettingsError
from treecast.services.router.keys import TENANT
from treecast.services.router.leases import Lease, Leases, epoch_without_redis
from treecast.services.router.sessions import (
    LeasedSession,
    NoSession,
    SampleSession,
    Taken,
    Whereabouts,
)
from treecast.wire.frames import SessionKey
from treecast.wire.guarded_redis import GuardedRedis, RedisLost

from ..conftest import LocalRedis

KEY = "treecast:lease:{default/s}"


@pytest.fixture
async def redis(empty_redis: str) -> AsyncIterator[GuardedRedis]:
    client = GuardedRedis(empty_redis, timeout_s=2.0)
    yield client
    await client.close()


@pytest.fixture
def leases(redis: GuardedRedis) -> Leases:
    return Leases(redis, ttl_s=60)


async def stored(redis: GuardedRedis, key: str = KEY) -> tuple[object, int]:
    """The raw value and the milliseconds that it has left."""
    return await redis.ask(lambda client: client.get(key)), await redis.ask(
        lambda client: client.pttl(key)
    )


async def test_claim_begins_at_the_servers_clock_when_the_session_is_new(
    leases: Leases, redis: GuardedRedis
) -> None:
    before_ms = time.time_ns() // 1_000_000
    lease = await leases.claim("default/s", "v1", None)
    assert lease.holder == "v1"
    assert before_ms <= lease.epoch <= time.time_ns() // 1_000_000
    value, left_ms = await stored(redis)
    assert value == f"{lease.epoch} v1"
    assert 59_000 < left_ms <= 60_000


async def test_epoch_grows_by_one_when_the_clock_lags_behind_it(
    leases: Leases, redis: GuardedRedis
) -> None:
    far = time.time_ns() // 1_000_000 + 10_000_000
    await redis.ask(lambda client: client.set(KEY, f"{far} v1"))
    assert await leases.claim("default/s", "v2", Lease("v1", far)) == Lease("v2", far + 1)


async def test_epoch_grows_when_a_session_is_placed_anew(leases: Leases) -> None:
    first = await leases.claim("default/s", "v1", None)
    second = await leases.claim("default/s", "v2", first)
    third = await leases.claim("default/s", "v1", second)
    assert (second.holder, third.holder) == ("v2", "v1")
    assert first.epoch < second.epoch < third.epoch


async def test_claim_changes_nothing_when_another_came_first(
    leases: Leases, redis: GuardedRedis
) -> None:
    seen = await leases.claim("default/s", "v1", None)
    winner = await leases.claim("default/s", "v2", seen)
    assert await leases.claim("default/s", "v3", seen) == winner
    assert await leases.claim("default/s", "v3", None) == winner
    assert (await stored(redis))[0] == f"{winner.epoch} v2"


async def test_one_of_many_wins_when_claims_race(leases: Leases) -> None:
    claims = (leases.claim("default/s", f"v{number}", None) for number in range(20))
    assert len(set(await asyncio.gather(*claims))) == 1


async def test_claim_is_made_again_when_the_lease_seen_has_vanished(leases: Leases) -> None:
    lease = await leases.claim("default/s", "v2", Lease("v1", 5))
    assert lease.holder == "v2"
    assert await leases.renew("default/s") == lease


async def test_renewal_keeps_holder_and_epoch_and_starts_the_time_anew(
    leases: Leases, redis: GuardedRedis
) -> None:
    lease = await leases.claim("default/s", "v1", None)
    await redis.ask(lambda client: client.pexpire(KEY, 1000))
    assert await leases.renew("default/s") == lease
    assert (await stored(redis))[1] > 59_000


async def test_nothing_is_found_when_the_session_is_unknown(leases: Leases) -> None:
    assert await leases.renew("default/s") is None
    assert await leases.release("default/s") is None


async def test_release_frees_the_session_and_tells_who_had_it(leases: Leases) -> None:
    lease = await leases.claim("default/s", "v1", None)
    assert await leases.release("default/s") == lease
    assert await leases.renew("default/s") is None


# --- Redis lost -------------------------------------------------------------------------------


async def test_breaker_refuses_at_once_when_redis_was_lost_a_moment_ago() -> None:
    now_s = 0.0
    dead = GuardedRedis("redis://127.0.0.1:1", timeout_s=1.0, pause_s=10.0, clock=lambda: now_s)
    calls = 0

    async def ping(client: Redis) -> object:
        nonlocal calls
        calls += 1
        return await client.ping()

    for _ in range(3):
        with pytest.raises(RedisLost):
            await dead.ask(ping)
    assert calls == 1
    now_s = 10.0
    with pytest.raises(RedisLost):
        await dead.ask(ping)
    assert calls == 2
    assert not dead.ok
    await dead.close()


async def test_one_caller_tries_when_the_pause_is_over(empty_redis: str) -> None:
    now_s = 0.0
    client = GuardedRedis(empty_redis, timeout_s=5.0, pause_s=10.0, clock=lambda: now_s)
    trying, proceed = asyncio.Event(), asyncio.Event()

    async def lose(_: Redis) -> None:
        raise ConnectionError

    async def hold(_: Redis) -> None:
        trying.set()
        await proceed.wait()

    async def ping(redis: Redis) -> object:
        return await redis.ping()

    with pytest.raises(RedisLost):
        await client.ask(lose)
    now_s = 10.0
    trial = asyncio.create_task(client.ask(hold))
    await trying.wait()
    with pytest.raises(RedisLost):
        await client.ask(ping)
    proceed.set()
    await trial
    assert client.ok
    assert await client.ask(ping) is True
    await client.close()


async def test_answer_is_not_waited_for_when_redis_hangs() -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    client = GuardedRedis(f"redis://{host}:{port}", timeout_s=0.05)
    with pytest.raises(RedisLost):
        await Leases(client, ttl_s=60).renew("default/s")
    await client.close()
    server.close()
    await server.wait_closed()


async def test_command_of_many_steps_is_cut_short_when_it_takes_too_long() -> None:
    async def never_end(client: Redis) -> None:
        await asyncio.Event().wait()

    client = GuardedRedis("redis://127.0.0.1:1", timeout_s=0.01)
    with pytest.raises(RedisLost):
        await client.ask(never_end)
    assert not client.ok
    await client.close()


async def test_redis_answers_again_when_it_comes_back(own_redis: LocalRedis) -> None:
    now_s = 0.0
    client = GuardedRedis(own_redis.url, timeout_s=2.0, clock=lambda: now_s)
    leases = Leases(client, ttl_s=60)
    await leases.claim("default/s", "v1", None)
    own_redis.kill()
    with pytest.raises(RedisLost):
        await leases.renew("default/s")
    assert not client.ok
    own_redis.start()
    now_s = 2.0
    assert await leases.renew("default/s") is None
    assert client.ok
    await client.close()


async def test_every_command_is_refused_when_no_redis_was_given() -> None:
    client = GuardedRedis(None)
    with pytest.raises(RedisLost):
        await Leases(client, ttl_s=60).claim("default/s", "v1", None)
    assert not client.ok
    await client.close()


def test_address_is_refused_when_it_is_no_redis_url() -> None:
    with pytest.raises(SettingsError, match=r"^redis_url is 'http://x': Redis URL must"):
        GuardedRedis("http://x")


# --- sessions ---------------------------------------------------------------------------------


def key(taken: Taken | None) -> SessionKey:
    assert taken is not None
    assert taken.key is not None
    return taken.key


async def test_second_turn_keeps_verifier_and_epoch(leases: Leases) -> None:
    first = LeasedSession(leases, TENANT, "s")
    assert await first.look() == Whereabouts()
    one = key(await first.take("v1", Whereabouts()))
    second = LeasedSession(leases, TENANT, "s")
    where = await second.look()
    assert where == Whereabouts(Lease("v1", one.epoch))
    assert key(await second.take("v1", where)) == one == SessionKey("default", "s", one.epoch)


async def test_session_moves_with_a_newer_epoch_when_its_verifier_is_gone(leases: Leases) -> None:
    session = LeasedSession(leases, TENANT, "s")
    one = key(await session.take("v1", Whereabouts()))
    two = key(await session.take("v2", await session.look()))
    assert two.epoch > one.epoch
    assert (await LeasedSession(leases, TENANT, "s").look()).holder == "v2"


async def test_request_follows_when_another_moved_the_session_first(leases: Leases) -> None:
    slow, quick = LeasedSession(leases, TENANT, "s"), LeasedSession(leases, TENANT, "s")
    won = key(await quick.take("v1", Whereabouts()))
    assert await slow.take("v2", Whereabouts()) is None
    where = await slow.look()
    assert where.holder == "v1"
    assert key(await slow.take("v1", where)) == won


@pytest.mark.parametrize("redis_works", [True, False])
async def test_samples_move_together_when_they_lose_their_verifier(
    leases: Leases, redis_works: bool
) -> None:
    if not redis_works:
        leases = Leases(GuardedRedis(None), ttl_s=60)
    session = LeasedSession(leases, TENANT, "s")
    await session.take("v1", Whereabouts())
    where = await session.look()
    one = key(await session.take("v2", where))
    assert await session.take("v3", where) is None
    assert key(await session.take("v2", where)) == one
    assert await session.look() == Whereabouts(Lease("v2", one.epoch))


async def test_epoch_is_renewed_when_a_verifier_calls_it_stale(leases: Leases) -> None:
    session = LeasedSession(leases, TENANT, "s")
    one = key(await session.take("v1", Whereabouts()))
    session.doubt()
    two = key(await session.take("v1", await session.look()))
    assert two.epoch > one.epoch
    assert key(await session.take("v1", await session.look())) == two


async def test_hash_decides_when_redis_is_lost_and_then_the_request_remembers() -> None:
    session = LeasedSession(Leases(GuardedRedis(None), ttl_s=60), TENANT, "s")
    where = await session.look()
    assert where == Whereabouts(rendezvous="default/s")
    before = epoch_without_redis()
    taken = key(await session.take("v1", where))
    assert before <= taken.epoch <= epoch_without_redis()
    assert await session.look() == Whereabouts(Lease("v1", taken.epoch))
    await session.end()


async def test_lease_is_renewed_when_a_long_request_ends(
    leases: Leases, redis: GuardedRedis
) -> None:
    session = LeasedSession(leases, TENANT, "s")
    await session.take("v1", Whereabouts())
    await redis.ask(lambda client: client.pexpire(KEY, 1000))
    await session.end()
    assert (await stored(redis))[1] > 59_000


async def test_session_keeps_its_verifier_when_a_request_outlives_its_lease(
    leases: Leases, redis: GuardedRedis
) -> None:
    session = LeasedSession(leases, TENANT, "s")
    one = key(await session.take("v1", await session.look()))
    await redis.ask(lambda client: client.delete(KEY))
    await session.end()
    where = await LeasedSession(leases, TENANT, "s").look()
    assert where.holder == "v1"
    assert where.lease is not None
    assert where.lease.epoch >= one.epoch
    assert (await stored(redis))[1] > 59_000


async def test_nothing_is_claimed_when_a_request_ends_that_had_no_verifier(leases: Leases) -> None:
    session = LeasedSession(leases, TENANT, "s")
    await session.look()
    await session.end()
    assert await session.look() == Whereabouts()


async def test_samples_share_a_session_that_is_forgotten_with_the_request() -> None:
    forgotten = []
    session = SampleSession(TENANT, "r", lambda holder, key: forgotten.append((holder, key)))
    one = key(await session.take("v1", await session.look()))
    assert (one.tenant, one.session_id) == ("samples/default", "r")
    where = await session.look()
    assert where.holder == "v1"
    assert key(await session.take("v1", where)) == one
    two = key(await session.take("v2", where))
    assert await session.take("v3", where) is None
    await session.end()
    assert forgotten == [("v2", two)]


async def test_request_has_no_key_when_it_has_no_session() -> None:
    session = NoSession()
    assert await session.look() == Whereabouts()
    assert await session.take("v1", Whereabouts()) == Taken(None)
    await session.end()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["renew", "claim", "release"]),
            st.sampled_from(["v1", "v2"]),
            st.integers(0, 2),
        ),
        max_size=12,
    )
)
@settings(deadline=None, max_examples=25)
def test_simulated_leases_answer_as_those_in_redis(
    redis_url: str, steps: list[tuple[str, str, int]]
) -> None:
    """The same calls on both, each claim with a lease that was seen some answers ago."""
    simulated = MemoryLeases(time.time, 60)
    assert asyncio.run(answers(simulated, steps)) == asyncio.run(in_redis(redis_url, steps))


async def in_redis(redis_url: str, steps: list[tuple[str, str, int]]) -> list[object]:
    redis = GuardedRedis(redis_url, timeout_s=2.0)
    try:
        return await answers(Leases(redis, ttl_s=60), steps)
    finally:
        await redis.close()


async def answers(leases: Leases, steps: list[tuple[str, str, int]]) -> list[object]:
    """Holders, and the order of epochs, which are times."""
    session = f"simulated/{secrets.token_hex(4)}"
    seen: list[Lease | None] = [None]
    for kind, holder, back in steps:
        if kind == "renew":
            seen.append(await leases.renew(session))
        elif kind == "release":
            seen.append(await leases.release(session))
        else:
            seen.append(await leases.claim(session, holder, seen[max(0, len(seen) - 1 - back)]))
        await asyncio.sleep(0.002)  # epochs are milliseconds
    epochs = sorted({lease.epoch for lease in seen if lease})
    return [lease and (lease.holder, epochs.index(lease.epoch)) for lease in seen]
