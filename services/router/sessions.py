"""Where a request's session lives: the lease, or without Redis a hash, and what was seen since."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from treecast.wire.frames import SessionKey
from treecast.wire.guarded_redis import RedisLost

from .leases import Lease, Leases, epoch_without_redis

SAMPLES_OF = "samples/"
"""Before the tenant, in sessions that only tie the samples of one request together."""


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where to look for a session's KV cache.

    Attributes:
        lease: whose it is, as far as we know; None for nobody's.
        rendezvous: the name to hash, when Redis cannot tell.
    """

    lease: Lease | None = None
    rendezvous: str = ""

    @property
    def holder(self) -> str:
        return self.lease.holder if self.lease else ""


@dataclass(frozen=True, slots=True)
class Taken:
    """The session is the holder's; `key` goes with the request, None for no session."""

    key: SessionKey | None


class Session(Protocol):
    """A session as one request, with all its samples, sees it."""

    async def look(self) -> Whereabouts:
        """Where the session is now."""

    async def take(self, holder: str, seen: Whereabouts) -> Taken | None:
        """Make `holder` the session's; None if it has been moved elsewhere since it was `seen`."""

    def doubt(self) -> None:
        """A verifier has seen a newer epoch than ours: the next `take` claims one."""

    async def end(self) -> None:
        """The request has ended."""


class NoSession:
    """A request whose KV cache is not kept."""

    async def look(self) -> Whereabouts:
        return Whereabouts()

    async def take(self, holder: str, seen: Whereabouts) -> Taken | None:
        return Taken(None)

    def doubt(self) -> None:
        pass

    async def end(self) -> None:
        pass


class SampleSession:
    """Ties the samples of one request together, so that they share their prompt's KV cache.

    Nobody else knows it: its lease lives here, and it is forgotten when the request ends.
    """

    def __init__(
        self, tenant: str, request_id: str, forget: Callable[[str, SessionKey], None]
    ) -> None:
        self._tenant = f"{SAMPLES_OF}{tenant}"
        self._request_id = request_id
        self._forget = forget
        self._lease: Lease | None = None

    async def look(self) -> Whereabouts:
        return Whereabouts(self._lease)

    async def take(self, holder: str, seen: Whereabouts) -> Taken | None:
        if self._lease == seen.lease and seen.holder != holder:
            self._lease = Lease(holder, epoch_without_redis())
        if self._lease is None or self._lease.holder != holder:
            return None
        return Taken(SessionKey(self._tenant, self._request_id, self._lease.epoch))

    def doubt(self) -> None:
        self._lease = None

    async def end(self) -> None:
        if self._lease is not None:
            key = SessionKey(self._tenant, self._request_id, self._lease.epoch)
            self._forget(self._lease.holder, key)


class LeasedSession:
    """A client's session, leased in Redis while Redis answers."""

    def __init__(self, leases: Leases, tenant: str, session_id: str) -> None:
        self._leases = leases
        self._tenant = tenant
        self._session_id = session_id
        self._name = lease_name(tenant, session_id)
        self._lease: Lease | None = None
        self._doubted = False

    async def look(self) -> Whereabouts:
        """Without Redis: the verifier that this request chose before, else by hash."""
        try:
            self._lease = await self._leases.renew(self._name)
        except RedisLost:
            if self._lease is None:
                return Whereabouts(rendezvous=self._name)
        return Whereabouts(self._lease)

    async def take(self, holder: str, seen: Whereabouts) -> Taken | None:
        lease = seen.lease
        if lease is None or lease.holder != holder or self._doubted:
            lease = self._lease = await self._claim(holder, seen)
            self._doubted = False
        if lease.holder != holder:
            return None
        return Taken(SessionKey(self._tenant, self._session_id, lease.epoch))

    async def _claim(self, holder: str, seen: Whereabouts) -> Lease:
        try:
            return await self._leases.claim(self._name, holder, seen.lease)
        except RedisLost:
            if self._lease is not None and self._lease != seen.lease:
                return self._lease  # another sample of this request was quicker
            return Lease(holder, epoch_without_redis())

    def doubt(self) -> None:
        self._doubted = True

    async def end(self) -> None:
        """Start the lease's time-to-live anew: the verifier keeps the KV cache from now on.

        A request may have outlived its lease, which is claimed again then.
        """
        try:
            if await self._leases.renew(self._name) is None and self._lease is not None:
                await self._leases.claim(self._name, self._lease.holder, None)
        except RedisLost:
            return


def lease_name(tenant: str, session_id: str) -> str:
    return f"{tenant}/{session_id}"
