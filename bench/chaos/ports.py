"""Ports that stay free until a process binds them, and between its death and its restart."""

from __future__ import annotations

import random
import socket

_BELOW_EPHEMERAL = range(20_000, 32_000)
"""The kernel gives none of these to outgoing connections."""


def quiet_port() -> int:
    """A loopback port that nobody listens on now."""
    while True:
        port = random.choice(_BELOW_EPHEMERAL)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
