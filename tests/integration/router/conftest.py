"""Scripted verifiers and a client, for the tests of the router."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from ..scripted_verifier import ScriptedVerifier
from .rig import RouterClient, routing


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Any]]:
    """Starts verifiers that end with the test."""
    async with AsyncExitStack() as stack:

        async def start(name: str = "v1", **options: Any) -> ScriptedVerifier:
            return await stack.enter_async_context(ScriptedVerifier(name, **options))

        yield start


@pytest.fixture
async def verifier(start: Callable[..., Any]) -> ScriptedVerifier:
    return await start()


@pytest.fixture
async def client(verifier: ScriptedVerifier) -> AsyncIterator[RouterClient]:
    async with routing([verifier]) as client:
        yield client
