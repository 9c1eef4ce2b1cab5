"""The chaos run itself: a tiny case always, all faults when there is time."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from treecast.bench.chaos.audit import take_stock
from treecast.bench.chaos.campaign import run_fault, steady
from treecast.bench.chaos.faults import Fault
from treecast.bench.chaos.load import Load, Outcome, toy_works, undisturbed
from treecast.bench.chaos.mesh import ChaosMesh, ChaosSettings
from treecast.services.local import MeshSettings


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREECAST_HOME", str(tmp_path / "home"))


async def kill_a_verifier(mesh: ChaosMesh) -> None:
    await mesh.kill("verifier-0")
    await mesh.restart("verifier-0")


async def test_nothing_is_lost_changed_or_left_when_a_verifier_dies_and_a_router_hangs(
    tmp_path: Path,
) -> None:
    mesh_settings = MeshSettings(engine="toy", num_verifiers=2, speculators=("ngram",))
    works = toy_works(4, 48)
    async with ChaosMesh(ChaosSettings(mesh_settings, tmp_path)) as mesh:
        expected = await undisturbed(mesh.router_addresses, works)
        async with Load(mesh.router_addresses, works, expected, 8) as load:

            async def hang_a_router(mesh: ChaosMesh) -> None:
                """Until every stream has ended that ran there: they must go on without it."""
                mesh.freeze("router-0")
                begun = len(load.records)
                await load.until(lambda: all(one.outcome for one in load.records[:begun]))
                mesh.thaw("router-0")

            for name, hurt in (("killed", kill_a_verifier), ("hung", hang_a_router)):
                await steady(load)
                async with asyncio.timeout(60):
                    row = await run_fault(mesh, load, Fault(name, hurt))
                assert row.in_flight == 8
                assert row.holds, row
        stock = await take_stock(mesh)
    assert set(load.counts) == {Outcome.SAME}
    assert sum(record.resumes for record in load.records) > 0
    assert {name: one.held for name, one in stock.items()} == dict.fromkeys(stock, 0)


async def test_a_changed_token_is_told_when_there_is_one(tmp_path: Path) -> None:
    mesh_settings = MeshSettings(engine="toy", num_verifiers=1, speculators=())
    works = toy_works(2, 8)
    async with ChaosMesh(ChaosSettings(mesh_settings, tmp_path, num_routers=1)) as mesh:
        expected = await undisturbed(mesh.router_addresses, works)
        expected["toy-1"] = (*expected["toy-1"][:-1], expected["toy-1"][-1] ^ 1)
        async with Load(mesh.router_addresses, works, expected, 2) as load:
            await load.until(lambda: load.counts[Outcome.CHANGED] > 0)
    assert {r.outcome for r in load.records if r.work == "toy-0"} == {Outcome.SAME}
    assert {r.outcome for r in load.records if r.work == "toy-1"} == {Outcome.CHANGED}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_fault_loses_and_changes_nothing() -> None:
    command = [sys.executable, "-m", "treecast.bench.chaos", "--quick"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
