"""The registry against a real Valkey server, and without one."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import structlog

from treecast.errors import SettingsError
from treecast.wire.frames import Role
from treecast.wire.guarded_redis import GuardedRedis
from treecast.wire.registry import Entry, Registration, Registry
from treecast.wire.resolving import Resolver

from ..conftest import LocalRedis

MEMBERS = "treecast:{registry:verifier}:members"
ENTRY = "treecast:{registry:verifier}:entry:"


@pytest.fixture
async def redis(empty_redis: str) -> AsyncIterator[GuardedRedis]:
    client = GuardedRedis(empty_redis, timeout_s=2.0)
    yield client
    await client.close()


@asynccontextmanager
async def registered(
    redis: GuardedRedis, name: str = "v1", beat_s: float = 60.0, role: Role = Role.VERIFIER
) -> AsyncIterator[None]:
    registration = Registration(redis, role, f"{name}:7000", name, "m", beat_s)
    await registration.start()
    try:
        yield
    finally:
        await registration.close()


async def entries_now(redis: GuardedRedis, *seeds: str) -> tuple[Entry, ...]:
    told: list[tuple[Entry, ...]] = [()]
    registry = Registry(redis, Role.VERIFIER, seeds)
    await registry.start(told.append)
    await registry.close()
    return told[-1]


async def test_process_is_listed_while_it_is_registered(redis: GuardedRedis) -> None:
    async with registered(redis, "v2"), registered(redis, "v1"):
        assert await entries_now(redis) == (
            Entry("v1:7000", "v1", "m"),
            Entry("v2:7000", "v2", "m"),
        )
    assert await entries_now(redis) == ()
    assert await redis.ask(lambda client: client.keys("*")) == []


async def test_roles_are_kept_apart(redis: GuardedRedis) -> None:
    async with registered(redis, "s1", role=Role.SPECULATOR):
        assert await entries_now(redis) == ()


async def test_entry_lives_three_seconds_when_its_process_dies(redis: GuardedRedis) -> None:
    async with registered(redis):
        left_ms = await redis.ask(lambda client: client.pttl(f"{ENTRY}v1"))
        assert 2000 < left_ms <= 3000


async def test_entry_is_kept_alive_when_it_would_end(redis: GuardedRedis) -> None:
    async with registered(redis, beat_s=0.01):
        await redis.ask(lambda client: client.delete(f"{ENTRY}v1"))
        async with asyncio.timeout(5):
            # Nothing tells when Redis has been written to, so it is asked.
            while not await redis.ask(lambda client: client.exists(f"{ENTRY}v1")):
                await asyncio.sleep(0)


async def test_member_is_dropped_when_its_entry_has_ended(redis: GuardedRedis) -> None:
    await redis.ask(lambda client: client.sadd(MEMBERS, "dead"))
    async with registered(redis):
        assert await entries_now(redis) == (Entry("v1:7000", "v1", "m"),)
    assert await redis.ask(lambda client: client.smembers(MEMBERS)) == set()


@pytest.mark.parametrize("text", ["", "nonsense", "[]", '{"address": "a:1"}'])
async def test_entry_is_passed_over_when_it_cannot_be_read(redis: GuardedRedis, text: str) -> None:
    await redis.ask(lambda client: client.sadd(MEMBERS, "bad"))
    await redis.ask(lambda client: client.set(f"{ENTRY}bad", text))
    async with registered(redis):
        assert await entries_now(redis) == (Entry("v1:7000", "v1", "m"),)


async def test_seeds_are_listed_beside_what_redis_has(redis: GuardedRedis) -> None:
    async with registered(redis):
        listed = await entries_now(redis, "v0:7000", "v1:7000")
    assert listed == (Entry("v0:7000"), Entry("v1:7000", "v1", "m"))


async def test_changes_are_told_once(redis: GuardedRedis) -> None:
    told: list[tuple[Entry, ...]] = []
    registry = Registry(redis, Role.VERIFIER, ["seed:1"], poll_s=60)
    await registry.start(told.append)
    await registry.poll()
    assert told == [(Entry("seed:1"),)]
    async with registered(redis):
        await registry.poll()
        await registry.poll()
    assert told[1:] == [(Entry("seed:1"), Entry("v1:7000", "v1", "m"))]
    await registry.close()


async def test_changes_are_found_by_polling(redis: GuardedRedis) -> None:
    found = asyncio.Event()
    registry = Registry(redis, Role.VERIFIER, poll_s=0.01)
    await registry.start(lambda entries: found.set())
    async with registered(redis), asyncio.timeout(5):
        await found.wait()
    await registry.close()


# --- without Redis ----------------------------------------------------------------------------


@pytest.mark.parametrize("url", [None, "redis://127.0.0.1:1"], ids=["none", "unreachable"])
async def test_seeds_are_enough_when_there_is_no_redis(url: str | None) -> None:
    redis = GuardedRedis(url)
    async with registered(redis):
        assert await entries_now(redis, "v0:7000") == (Entry("v0:7000"),)
        assert not redis.ok
    await redis.close()


async def test_last_snapshot_is_kept_and_the_loss_logged_once_when_redis_dies(
    own_redis: LocalRedis,
) -> None:
    redis = GuardedRedis(own_redis.url, timeout_s=2.0, pause_s=0.0)
    told: list[tuple[Entry, ...]] = []
    registry = Registry(redis, Role.VERIFIER, poll_s=60)
    async with registered(redis):
        await registry.start(told.append)
        assert redis.ok
        own_redis.kill()
        with structlog.testing.capture_logs() as logs:
            await registry.poll()
            await registry.poll()
        assert [entry["event"] for entry in logs] == ["redis lost"]
        assert not redis.ok
        assert told == [(Entry("v1:7000", "v1", "m"),)]
    await registry.close()
    await redis.close()


# --- seeds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seed", ["", "host", "host:", ":1", "host:0", "host:65536", "http://x:1", "dns:///x", "x:1/y"]
)
def test_seed_is_refused_by_name_when_it_is_malformed(seed: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        Registry(GuardedRedis(None), Role.VERIFIER, [seed])
    assert refusal.value.message == (
        f"seed is {seed!r}; it must be host:port or dns:///name:port, port 1..65535"
    )


async def test_name_stands_for_all_its_addresses() -> None:
    resolver = Resolver(("dns:///127.0.0.1:7000", "other:1", "dns:///localhost:7001"), wait_s=5.0)
    assert await resolver.resolve() == ("127.0.0.1:7000", "other:1", "127.0.0.1:7001")
    await resolver.close()


async def test_one_family_is_taken_and_kept_when_a_name_is_not_found_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [
        (socket.AF_INET6, 1, 6, "", ("fd00::1", 7000, 0, 0)),
        (socket.AF_INET, 1, 6, "", ("10.0.0.2", 7000)),
        (socket.AF_INET, 1, 6, "", ("10.0.0.1", 7000)),
    ]
    answers = iter([found, found[:1]])

    async def getaddrinfo(*args: object, **kwargs: object) -> object:
        try:
            return next(answers)
        except StopIteration:
            raise OSError("name unknown") from None

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    resolver = Resolver(("dns:///verifiers:7000",), wait_s=5.0)
    assert await resolver.resolve() == ("10.0.0.1:7000", "10.0.0.2:7000")
    with structlog.testing.capture_logs() as logs:
        assert [await resolver.resolve() for _ in range(3)] == [("[fd00::1]:7000",)] * 3
    assert [entry["event"] for entry in logs] == ["name not resolved"]  # once, not each time
    await resolver.close()


async def test_seeds_are_told_at_once_when_a_name_server_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def getaddrinfo(*args: object, **kwargs: object) -> object:
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    resolver = Resolver(("dns:///verifiers:7000", "v0:7000"), wait_s=0.01)
    assert await resolver.resolve() == ("v0:7000",)
    assert await resolver.resolve() == ("v0:7000",)
    await resolver.close()
