"""What a kubelet and a Pod's neighbours ask a process: is it live, is it ready, where is it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry

from treecast.errors import SettingsError
from treecast.settings import ServiceSettings
from treecast.wire.frames import Role
from treecast.wire.guarded_redis import GuardedRedis
from treecast.wire.lifecycle import Presence
from treecast.wire.server import Server


@asynccontextmanager
async def present(**flags: str) -> AsyncIterator[Presence]:
    argv = [f"--{name}={value}" for name, value in flags.items()]
    settings = ServiceSettings.load(argv, "test")
    redis, registry = GuardedRedis(None), CollectorRegistry()
    async with Presence(settings, Role.ROUTER, "router-1", Server(), redis, registry) as presence:
        yield presence


def status_of(address: str, path: str) -> int:
    try:
        with urlopen(f"http://{address}{path}", timeout=10) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


async def test_http_probes_follow_readiness_when_asked() -> None:
    async with present() as presence:
        ask = lambda path: asyncio.to_thread(status_of, presence.metrics_address, path)  # noqa: E731
        assert [await ask("/live"), await ask("/ready")] == [200, 503]
        await presence.server.set_ready()
        assert await ask("/ready") == 200
        await presence.leave()
        assert [await ask("/live"), await ask("/ready"), await ask("/metrics")] == [200, 503, 200]


async def test_live_says_no_when_the_event_loop_hangs() -> None:
    async with present() as presence:
        with ThreadPoolExecutor(1) as kubelet:
            asked = kubelet.submit(status_of, presence.metrics_address, "/live")
            assert asked.result() == 503  # waiting for it hangs this loop


@pytest.mark.parametrize(
    ("given", "dialled"),
    [
        ("10.0.0.7:7071", "10.0.0.7:7071"),
        ("fd00::7:7071", "[fd00::7]:7071"),
        ("[fd00::7]:7071", "[fd00::7]:7071"),
    ],
)
async def test_an_address_is_advertised_as_it_is_dialled_when_given(
    given: str, dialled: str
) -> None:
    async with present(advertise=given) as presence:
        assert presence.address == dialled


async def test_start_is_refused_when_the_advertised_address_has_no_port() -> None:
    with pytest.raises(SettingsError, match=r"advertise is '10\.0\.0\.7'; it must be host:port"):
        async with present(advertise="10.0.0.7"):
            raise AssertionError("it started")
