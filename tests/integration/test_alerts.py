"""Each alert in a mesh that has come to harm; for how long is left to the rules' tests."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from treecast import AsyncClient, SamplingParams
from treecast.dashboards.alerts import ALERTS
from treecast.dashboards.debian import Binaries
from treecast.dashboards.generated import alerts_text
from treecast.dashboards.prometheus import Prometheus
from treecast.errors import TreecastError
from treecast.services.local import LocalMesh, MeshSettings

from ..dashboard_contract import alert_states
from .test_dashboards import targets

pytestmark = pytest.mark.slow

GREEDY = SamplingParams(temperature=0, ignore_eos=True)


@contextmanager
def watched(
    binaries: Binaries, log_dir: Path, **settings: Any
) -> Iterator[tuple[LocalMesh, Prometheus]]:
    """A toy mesh with Prometheus on it, alert rules included."""
    configured = MeshSettings(engine="toy", torch_threads=1, log_dir=log_dir, **settings)
    with (
        LocalMesh(configured) as mesh,
        Prometheus(binaries, targets(mesh), 0.5, alerts_text()) as prometheus,
    ):
        prometheus.wait_for("treecast_router_verifier_streams == 1")
        assert set(alert_states(prometheus).values()) == {"inactive"}
        yield mesh, prometheus


async def call(
    mesh: LocalMesh, count: int, sampling: SamplingParams, prometheus: Prometheus, *alerts: str
) -> None:
    """Keep `count` requests going until the alerts are pending; errors are part of it."""

    async def caller(client: AsyncClient, number: int) -> None:
        for turn in range(10_000):
            with suppress(TreecastError):
                prompt = [1 + (7 * number + turn + i) % 90 for i in range(24)]
                async for _ in client.generate(prompt, sampling):
                    pass
            await asyncio.sleep(0.01)

    async with AsyncClient(mesh.router_address) as client:
        callers = [asyncio.create_task(caller(client, number)) for number in range(count)]
        try:
            await asyncio.to_thread(until_alerting, prometheus, *alerts)
        finally:
            for task in callers:
                task.cancel()
            await asyncio.gather(*callers, return_exceptions=True)


def until_alerting(prometheus: Prometheus, *alerts: str) -> None:
    for alert in alerts:
        prometheus.wait_for(f'ALERTS{{alertname="{alert}"}}')
    assert {alert_states(prometheus)[alert] for alert in alerts} <= {"pending", "firing"}


def test_alerts_fire_when_the_verifier_and_redis_are_lost(binaries, tmp_path):
    flags = {"verifier_grace_s": 0.1}
    with watched(binaries, tmp_path, router_flags=flags) as (mesh, prometheus):
        mesh.processes["verifier-0"].kill()
        mesh.processes["valkey"].kill()
        lost = ("TreecastNoVerifier", "TreecastRedisDown")
        burns = ("TreecastErrorBudgetBurnFast", "TreecastErrorBudgetBurnSlow")
        asyncio.run(call(mesh, 2, GREEDY, prometheus, *lost, *burns))


def test_alerts_fire_when_requests_wait_for_room(binaries, tmp_path):
    flags = {"max_running": 2, "pool_tokens": 1024, "toy_step_s": 0.05}
    sampling = SamplingParams(temperature=0, max_tokens=850, ignore_eos=True)
    with watched(binaries, tmp_path, verifier_flags=flags, speculators=()) as (mesh, prometheus):
        asyncio.run(call(mesh, 3, sampling, prometheus, "TreecastKVPressure", "TreecastQueueWait"))


def test_an_alert_fires_when_a_drain_does_not_end(binaries, tmp_path):
    with watched(
        binaries,
        tmp_path,
        router_flags={"drain_s": 60},
        verifier_flags={"toy_step_s": 0.05},
        speculators=(),
        stop_grace_s=0.5,
    ) as (mesh, prometheus):

        async def drain() -> None:
            async with AsyncClient(mesh.router_address) as client:
                sampling = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
                stream = client.generate([5, 6, 7], sampling)
                await anext(stream)
                mesh.processes["router"].signal(signal.SIGTERM)
                await asyncio.to_thread(until_alerting, prometheus, "TreecastDrainStuck")
                await stream.aclose()

        asyncio.run(drain())


def test_an_alert_fires_when_nothing_is_guessed_right(binaries, tmp_path):
    random = SamplingParams(temperature=50, max_tokens=300, ignore_eos=True)
    with watched(binaries, tmp_path, planner="full", speculators=("ngram",)) as (mesh, prometheus):
        asyncio.run(call(mesh, 4, random, prometheus, "TreecastAcceptanceCollapse"))


def test_an_alert_fires_when_trees_come_too_late(binaries, tmp_path):
    """Each tree takes so long that the verifier has decoded past its deepest node."""
    long = SamplingParams(temperature=0, max_tokens=800, ignore_eos=True)
    slow = {"toy_step_s": 0.1, "shares_cores": False}
    with watched(binaries, tmp_path, speculators=("ssm",), speculator_flags=slow) as (
        mesh,
        prometheus,
    ):
        asyncio.run(call(mesh, 1, long, prometheus, "TreecastStaleFrames"))


def test_no_alert_is_left_out() -> None:
    text = Path(__file__).read_text()
    assert all(f'"{alert.name}"' in text for alert in ALERTS)
