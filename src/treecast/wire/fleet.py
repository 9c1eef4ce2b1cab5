"""Streams to every process of a role that the registry knows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

from treecast.wire.pair import Dialer
from treecast.wire.registry import Entry, Registry

Out = TypeVar("Out")
In = TypeVar("In")

_SWEEP_S = 1.0


class Fleet(Generic[Out, In]):
    """One dialer per registry entry, from `start` to `close`.

    An entry that vanishes does not end a stream that lives: the registry says where to dial, never
    who is healthy. Its dialer goes once the stream is down.
    """

    def __init__(self, registry: Registry, dial: Callable[[str], Dialer[Out, In]]) -> None:
        self._registry = registry
        self._dial = dial
        self._dialers: dict[str, Dialer[Out, In]] = {}
        self._sweeping: asyncio.Task[None] | None = None

    @property
    def dialers(self) -> list[Dialer[Out, In]]:
        """In order of address."""
        return [self._dialers[address] for address in sorted(self._dialers)]

    @property
    def redis_ok(self) -> bool:
        return self._registry.redis_ok

    async def start(self) -> None:
        await self._registry.start(self._changed)
        self._sweeping = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """Close all streams and stop looking. Safe to repeat."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            with suppress(asyncio.CancelledError):
                await self._sweeping
        await self._registry.close()
        await asyncio.gather(*(dialer.close() for dialer in self._dialers.values()))

    def _changed(self, entries: tuple[Entry, ...]) -> None:
        for entry in entries:
            if entry.address not in self._dialers:
                self._dialers[entry.address] = dialer = self._dial(entry.address)
                dialer.start()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            known = {entry.address for entry in self._registry.entries}
            gone = [a for a, d in self._dialers.items() if a not in known and d.link is None]
            for address in gone:
                await self._dialers.pop(address).close()
