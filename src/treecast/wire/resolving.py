"""Seeds to addresses: `host:port` is one; `dns:///name:port` is all that the name has now."""

from __future__ import annotations

import asyncio
import socket

import structlog

from treecast.address import Address, parse_address

log = structlog.get_logger()

DNS_SCHEME = "dns:///"
WAIT_S = 0.25


def check_seed(seed: str) -> str:
    """Raises SettingsError for anything but `host:port` and `dns:///name:port`."""
    _parse(seed)
    return seed


def _parse(seed: str) -> Address:
    return parse_address(seed, "seed", lowest_port=1, scheme=DNS_SCHEME)


class Resolver:
    """Looks up the names among some seeds; a lookup that is slow or fails keeps the last answer."""

    def __init__(self, seeds: tuple[str, ...], wait_s: float = WAIT_S) -> None:
        self._seeds = seeds
        self._wait_s = wait_s
        self._known: dict[str, tuple[str, ...]] = {
            seed: (seed,) for seed in seeds if not seed.startswith(DNS_SCHEME)
        }
        self._lookups: dict[str, asyncio.Task[None]] = {}
        self._failing: set[str] = set()

    async def resolve(self) -> tuple[str, ...]:
        """Every seed's addresses; waits for lookups a quarter of a second at most."""
        for seed in self._seeds:
            if seed.startswith(DNS_SCHEME) and seed not in self._lookups:
                self._lookups[seed] = asyncio.create_task(self._look_up(seed))
        if self._lookups:
            await asyncio.wait(self._lookups.values(), timeout=self._wait_s)
        found = [address for seed in self._seeds for address in self._known.get(seed, ())]
        return tuple(dict.fromkeys(found))

    async def close(self) -> None:
        pending = list(self._lookups.values())
        for lookup in pending:
            lookup.cancel()
        await asyncio.gather(*pending, return_exceptions=True)

    async def _look_up(self, seed: str) -> None:
        try:
            self._known[seed] = await _addresses(_parse(seed))
            self._failing.discard(seed)
        except OSError as error:
            if seed not in self._failing:  # said once: a headless Service has no name while empty
                log.warning("name not resolved", seed=seed, error=str(error))
            self._failing.add(seed)
        finally:
            del self._lookups[seed]


async def _addresses(named: Address) -> tuple[str, ...]:
    """IPv4 addresses, or IPv6 where there are none: a process with both is listed once."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(named.host, named.port, type=socket.SOCK_STREAM)
    v4 = {str(Address(str(info[4][0]), named.port)) for info in found if info[0] == socket.AF_INET}
    v6 = {str(Address(str(info[4][0]), named.port)) for info in found if info[0] == socket.AF_INET6}
    return tuple(sorted(v4 or v6))
