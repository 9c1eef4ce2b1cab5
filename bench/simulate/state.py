"""What routers share in Redis, kept in this process, with the routers' own semantics over it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from treecast.services.router.leases import Lease, Leases
from treecast.services.router.prefixes import Prefixes, keys_of

T = TypeVar("T")


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("a coroutine waited in simulated time")


class MemoryLeases(Leases):
    """Compare-and-set as the script in `leases.py` does it; TTLs by simulated time."""

    def __init__(self, clock: Callable[[], float], ttl_s: float) -> None:
        self._clock = clock
        self._ttl_s = ttl_s
        self._stored: dict[str, tuple[Lease, float]] = {}

    async def renew(self, session: str) -> Lease | None:
        lease = self._get(session)
        if lease is not None:
            self._stored[session] = (lease, self._clock() + self._ttl_s)
        return lease

    async def claim(self, session: str, holder: str, seen: Lease | None) -> Lease:
        stored = self._get(session)
        epoch = stored.epoch if stored else 0
        if stored is not None and epoch != (seen.epoch if seen else 0):
            return stored
        lease = Lease(holder, max(epoch + 1, round(1000 * self._clock())))
        self._stored[session] = (lease, self._clock() + self._ttl_s)
        return lease

    async def release(self, session: str) -> Lease | None:
        lease = self._get(session)
        self._stored.pop(session, None)
        return lease

    def _get(self, session: str) -> Lease | None:
        lease, until_s = self._stored.get(session, (None, 0.0))
        return lease if self._clock() < until_s else None


class MemoryPrefixes(Prefixes):
    """Hints by the routers' own keys."""

    def __init__(self, clock: Callable[[], float], ttl_s: float) -> None:
        self._clock = clock
        self._ttl_s = ttl_s
        self._stored: dict[str, tuple[str, float]] = {}

    async def find(self, tenant: str, prompt: Sequence[int]) -> tuple[str, ...]:
        found = [self._stored.get(key, ("", 0.0)) for key in reversed(keys_of(tenant, prompt))]
        now_s = self._clock()
        return tuple(dict.fromkeys(holder for holder, until_s in found if now_s < until_s))

    async def note(self, tenant: str, prompt: Sequence[int], holder: str) -> None:
        until_s = self._clock() + self._ttl_s
        for key in keys_of(tenant, prompt):
            self._stored[key] = (holder, until_s)
