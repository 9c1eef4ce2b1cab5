"""Which routers a client knows, and which of them it talks to now."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from treecast.address import parse_address
from treecast.errors import InvalidRequest, TreecastError, Unavailable
from treecast.wire.tls import Pem, Tls

from .access import Access

DEFAULT_ADDRESS = "127.0.0.1:7070"
ADDRESS_VARIABLE = "TREECAST_ROUTER"

ChannelT = TypeVar("ChannelT")


def router_addresses(address: str | Sequence[str] | None) -> tuple[str, ...]:
    """The routers to use, in order: as given, else from TREECAST_ROUTER, else the local one.

    Args:
        address: "host:port", "dns:///name:port", several with commas between, or a list.
    Raises:
        InvalidRequest: an address has no port, or there is none at all.
    """
    if address is None:
        address = os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
    given = address.split(",") if isinstance(address, str) else address
    addresses = tuple(item.strip() for item in given if item.strip())
    if not addresses:
        raise InvalidRequest(f"router address is {address!r}; it must be host:port")
    for item in addresses:
        if not item.startswith("unix:"):
            parse_address(
                item, "router address", lowest_port=1, scheme="dns:///", error=InvalidRequest
            )
    return addresses


class Connections(Generic[ChannelT]):
    """One channel per address, opened when first used; `leave` moves on to the next address.

    Once certificates were replaced, new calls go over new channels; calls that run go on over
    the old ones.

    Attributes:
        metadata: what goes with every call.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        dial: Callable[[str, Tls | None], ChannelT],
        access: Access = Access((), None),  # noqa: B008  frozen
    ) -> None:
        self.metadata = access.metadata
        self._addresses = addresses
        self._dial = dial
        self._tls = access.tls
        self._pem: Pem | None = None
        self._open: dict[str, ChannelT] = {}
        self._outdated: list[ChannelT] = []
        self._at = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._addresses)

    @property
    def address(self) -> str:
        return self._addresses[self._at]

    def channel(self, address: str) -> ChannelT:
        """The channel to one of the addresses; opening one does not block."""
        with self._lock:
            self._follow_certificates()
            if address not in self._open:
                self._open[address] = self._dial(address, self._tls)
            return self._open[address]

    def _follow_certificates(self) -> None:
        pem = self._tls.refreshed() if self._tls is not None else None
        if pem is not self._pem:
            self._pem = pem
            self._outdated += self._open.values()
            self._open.clear()

    def leave(self, address: str) -> None:
        """Use the next address from now on, unless another stream has moved on from this one."""
        with self._lock:
            if address == self.address:
                self._at = (self._at + 1) % len(self._addresses)

    def take_all(self) -> list[ChannelT]:
        """Give up every channel, for the caller to close."""
        channels = [*self._open.values(), *self._outdated]
        self._open.clear()
        self._outdated.clear()
        return channels


def name_router(error: TreecastError, address: str) -> TreecastError:
    """Say which router could not serve; other errors are about the request and stay as they are."""
    if not isinstance(error, Unavailable):
        return error
    return Unavailable(f"router {address}: {error.message}", error.retry_after_s)
