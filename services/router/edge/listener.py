"""A uvicorn server in the event loop of the router, which alone hears signals."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from treecast.address import parse_address
from treecast.errors import SettingsError

_BACKLOG = 2048
_STOP_GRACE_S = 1
_HEAD_BYTES = 64 * 1024
"""Largest request line and headers."""


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the service, which drains first."""
        yield


class HttpListener:
    """Serves one app on one address."""

    def __init__(self, app: ASGIApp, listen: str, tls: ssl.SSLContext | None = None) -> None:
        """Binds nothing yet. Raises SettingsError: the address is malformed."""
        self._address = parse_address(listen, "http_listen")
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=_HEAD_BYTES,
            timeout_graceful_shutdown=_STOP_GRACE_S,
        )
        config.load()
        config.ssl = tls
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Listen; returns the bound address, with the port that 0 stood for.

        Raises:
            SettingsError: the address is in use, or not this machine's.
        """
        listening = self._bind()
        bound = self._address.with_port(listening.getsockname()[1])
        self._serving = asyncio.create_task(self._server.serve(sockets=[listening]))
        return str(bound)

    def _bind(self) -> socket.socket:
        at = self._address
        try:
            listening = socket.create_server((at.host, at.port), family=at.family, backlog=_BACKLOG)
        except OSError as error:
            why = error.strerror or str(error)
            raise SettingsError(f"http_listen {at} cannot be bound: {why}") from error
        listening.setblocking(False)
        return listening

    async def close(self) -> None:
        """Take no new connections, and give those that run a second. Safe to repeat."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
