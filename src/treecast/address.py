"""Where a process listens or is found: HOST:PORT, read in one way everywhere."""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace

from treecast.errors import SettingsError, TreecastError

HIGHEST_PORT = 65535


@dataclass(frozen=True, slots=True)
class Address:
    """A host and its port; `str` writes it as it was read.

    Attributes:
        host: a name or a number; IPv6 without its brackets.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def family(self) -> socket.AddressFamily:
        """Of a socket that listens there."""
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    def with_port(self, port: int) -> Address:
        """The same host with the port that was bound for 0."""
        return replace(self, port=port)


def parse_address(
    text: str,
    what: str,
    *,
    lowest_port: int = 0,
    scheme: str = "",
    error: type[TreecastError] = SettingsError,
) -> Address:
    """Read host:port; gRPC itself would take a port of 99999 for 34463.

    Args:
        what: whose address it is, for the message.
        scheme: what may stand before it, such as "dns:///".
    Raises:
        TreecastError: of the type `error`, for anything else.
    """
    host, _, port = text.removeprefix(scheme).rpartition(":")
    known = host and "/" not in host and port.isdecimal() and port.isascii()
    if not known or not lowest_port <= int(port) <= HIGHEST_PORT:
        forms = f"host:port or {scheme}name:port" if scheme else "host:port"
        raise error(f"{what} is {text!r}; it must be {forms}, port {lowest_port}..{HIGHEST_PORT}")
    return Address(host.removeprefix("[").removesuffix("]"), int(port))
