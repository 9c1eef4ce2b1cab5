"""Who is there: addresses of a role's processes, from Redis and from seeds.

Each process keeps an entry with a time-to-live in Redis; readers poll. Without Redis the last
snapshot and the seeds remain, so everything starts and serves from seeds alone. The registry says
where to dial, never who is healthy: that is known by the dialer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Annotated

import structlog
from pydantic import BeforeValidator
from pydantic_settings import NoDecode
from redis.asyncio import Redis

from treecast.settings import split_commas
from treecast.wire.frames import Role
from treecast.wire.guarded_redis import GuardedRedis, RedisLost
from treecast.wire.resolving import Resolver, check_seed

log = structlog.get_logger()

BEAT_S = 1.0
TTL_S = 3.0
POLL_S = 1.0


Addresses = Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)]
"""A settings field of seeds: comma-separated, and the flag may be repeated."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a process can be dialled. Instance and model are empty for a seed."""

    address: str
    instance_id: str = ""
    model: str = ""


def _members_key(role: Role) -> str:
    return f"treecast:{{registry:{role.name.lower()}}}:members"


def _entry_key(role: Role, instance_id: str) -> str:
    return f"treecast:{{registry:{role.name.lower()}}}:entry:{instance_id}"


class Registration:
    """Keeps this process's entry alive in Redis, from `start` to `close`.

    The entry is written each second with a time-to-live of three, so that it vanishes with its
    process. Without Redis nothing is written, and nothing fails.
    """

    def __init__(
        self,
        redis: GuardedRedis,
        role: Role,
        address: str,
        instance_id: str,
        model: str = "",
        beat_s: float = BEAT_S,
    ) -> None:
        """Writes nothing yet. `redis` stays the caller's, to be closed after this."""
        self._redis = redis
        self._role = role
        self._entry = Entry(address, instance_id, model)
        self._beat_s = beat_s
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Write the entry once, if Redis answers, then keep it alive."""
        await self._write()
        self._task = asyncio.create_task(self._keep_alive())

    async def close(self) -> None:
        """Take the entry back. Safe to call again."""
        if self._task is None:
            return
        await _stop(self._task)
        self._task = None
        with suppress(RedisLost):
            await self._redis.ask(self._remove)

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(self._beat_s)
            await self._write()

    async def _write(self) -> None:
        with suppress(RedisLost):
            await self._redis.ask(self._put)

    async def _put(self, redis: Redis) -> None:
        key = _entry_key(self._role, self._entry.instance_id)
        async with redis.pipeline(transaction=False) as pipe:
            pipe.set(key, json.dumps(asdict(self._entry)), px=round(TTL_S * 1000))
            pipe.sadd(_members_key(self._role), self._entry.instance_id)
            await pipe.execute()

    async def _remove(self, redis: Redis) -> None:
        async with redis.pipeline(transaction=False) as pipe:
            pipe.delete(_entry_key(self._role, self._entry.instance_id))
            pipe.srem(_members_key(self._role), self._entry.instance_id)
            await pipe.execute()


class Registry:
    """Entries of one role: the last snapshot of Redis, and the seeds.

    Seeds are `host:port`, or `dns:///name:port` for every address that the name has.
    """

    def __init__(
        self,
        redis: GuardedRedis,
        role: Role,
        seeds: Iterable[str] = (),
        poll_s: float = POLL_S,
    ) -> None:
        """Asks nobody yet. `redis` stays the caller's, to be closed after this.

        Raises:
            SettingsError: a seed is malformed.
        """
        self._redis = redis
        self._role = role
        self._resolver = Resolver(tuple(check_seed(seed) for seed in seeds))
        self._poll_s = poll_s
        self._snapshot: tuple[Entry, ...] = ()
        self._entries: tuple[Entry, ...] = ()
        self._on_change: Callable[[tuple[Entry, ...]], None] = lambda entries: None
        self._task: asyncio.Task[None] | None = None

    async def start(self, on_change: Callable[[tuple[Entry, ...]], None]) -> None:
        """Poll once, then each second.

        Args:
            on_change: gets the entries whenever they differ: one per address, in a stable order.
        """
        self._on_change = on_change
        await self.poll()
        self._task = asyncio.create_task(self._keep_polling())

    async def close(self) -> None:
        if self._task is not None:
            await _stop(self._task)
            self._task = None
        await self._resolver.close()

    async def poll(self) -> None:
        """Look once. Never fails: what cannot be read stays as it was."""
        with suppress(RedisLost):
            self._snapshot = await self._redis.ask(self._read)
        seeds = tuple(Entry(address) for address in await self._resolver.resolve())
        by_address = {entry.address: entry for entry in (*seeds, *self._snapshot)}
        entries = tuple(by_address[address] for address in sorted(by_address))
        if entries != self._entries:
            self._entries = entries
            self._on_change(entries)

    async def _keep_polling(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            await self.poll()

    async def _read(self, redis: Redis) -> tuple[Entry, ...]:
        members = sorted(map(str, await redis.smembers(_members_key(self._role))))
        if not members:
            return ()
        texts = await redis.mget([_entry_key(self._role, member) for member in members])
        gone = [member for member, text in zip(members, texts, strict=True) if text is None]
        if gone:
            await redis.srem(_members_key(self._role), *gone)
        return tuple(entry for text in texts if text and (entry := _parse(str(text))))


def _parse(text: str) -> Entry | None:
    try:
        fields = json.loads(text)
        return Entry(str(fields["address"]), str(fields["instance_id"]), str(fields["model"]))
    except (ValueError, TypeError, KeyError):
        log.warning("unreadable registry entry", num_characters=len(text))
        return None


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
