"""Dashboards and alerts against a real Prometheus that scrapes a real mesh."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from treecast.dashboards.debian import Binaries
from treecast.dashboards.generated import DASHBOARDS, alerts_text
from treecast.dashboards.prometheus import Prometheus
from treecast.dashboards.traffic import run_traffic
from treecast.services.local import LocalMesh, MeshSettings

from .. import dashboard_contract as contract
from ..dashboard_contract import Expression, Finding

PROMPTS = [[5, 6, 7, 8, 5, 6, 7], list(range(1, 90)), [3] * 40]
WINDOW = "30s"


@dataclass(frozen=True)
class Scraped:
    """A Prometheus that has seen `start_s` to `end_s` of a mesh at work."""

    prometheus: Prometheus
    start_s: float
    end_s: float

    def check(self, expression: Expression) -> Finding:
        return contract.check(expression, self.prometheus, self.start_s, self.end_s)


def targets(mesh: LocalMesh) -> dict[str, str]:
    found = {name: process for name, process in mesh.processes.items() if name != "valkey"}
    return {name: str(process.metrics_address) for name, process in found.items()}


SMALL: dict[str, Any] = {"speculators": ("ssm",)}
WHOLE: dict[str, Any] = {"speculators": ("ssm", "ngram", "suffix"), "num_verifiers": 2}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((SMALL, 3.0), id="small"),
        pytest.param((WHOLE, 20.0), id="whole", marks=pytest.mark.slow),
    ],
)
def scraped(
    request: pytest.FixtureRequest, binaries: Binaries, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scraped]:
    """A mesh with little room, so that requests queue, and with drafts that run ahead.

    A step takes its time, so that waiting for trees is worth it.
    """
    shape, seconds = request.param
    settings = MeshSettings(
        engine="toy",
        torch_threads=1,
        log_dir=tmp_path_factory.mktemp("logs"),
        verifier_flags={"toy_step_s": 0.02, "max_running": 4, "pool_tokens": 1024},
        speculator_flags={"shares_cores": False},
        **shape,
    )
    with (
        LocalMesh(settings) as mesh,
        Prometheus(binaries, targets(mesh), 0.5, alerts_text()) as prometheus,
    ):
        began = time.time()
        asyncio.run(run_traffic(mesh.router_address, PROMPTS, 8, seconds, 60))
        prometheus.wait_for('treecast_router_running_requests{pod="router"} == 0')
        yield Scraped(prometheus, began, time.time())


def test_every_expression_returns_data_when_a_mesh_is_at_work(scraped: Scraped) -> None:
    findings = [scraped.check(one) for one in contract.expressions(DASHBOARDS, WINDOW)]
    for found in findings:
        print(f"{found.num_series:3} series  {found.expression.where}  {found.fault}")  # noqa: T201
    assert [found for found in findings if found.fault] == []


def test_alerts_are_quiet_when_a_mesh_is_well(scraped: Scraped) -> None:
    quiet = [contract.check_quiet(one, scraped.prometheus) for one in contract.alert_expressions()]
    assert [found for found in quiet if found.fault] == []
    assert set(contract.alert_states(scraped.prometheus).values()) == {"inactive"}


def test_the_contract_is_broken_when_a_metric_is_renamed(scraped: Scraped) -> None:
    existing = scraped.prometheus.metric_names()
    for one in (*contract.expressions(DASHBOARDS, WINDOW), *contract.alert_expressions()):
        assert not contract.unknown(one, existing)
        for name in contract.metric_names(one.expr):
            renamed = replace(one, expr=re.sub(rf"\b{name}\b", f"{name}_renamed", one.expr))
            assert contract.unknown(renamed, existing) == f"no such metric: {name}_renamed"
    name = "treecast_verifier_step_tokens_sum"
    gone = Expression("here", f"rate({name}_renamed[30s])")
    assert scraped.check(gone).fault == f"no such metric: {name}_renamed"
    assert contract.check_quiet(gone, scraped.prometheus).fault == scraped.check(gone).fault


def test_the_contract_is_broken_when_an_expression_does_not_parse_or_finds_nothing(
    scraped: Scraped,
) -> None:
    faults = {
        expr: scraped.check(Expression("here", expr)).fault
        for expr in (
            "sum(rate(treecast_router_tokens_total[5m])",
            'treecast_draining{pod="nobody"}',
            "0 * treecast_draining / 0",
        )
    }
    assert "parse error" in faults.pop("sum(rate(treecast_router_tokens_total[5m])")
    assert set(faults.values()) == {"no data"}
