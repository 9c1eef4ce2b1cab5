"""The chaos run itself: a tiny case always, all faults when there is time."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest
import pytest_asyncio

from treecast.bench.chaos.audit import take_stock
from treecast.bench.chaos.campaign import run_fault, steady
from treecast.bench.chaos.faults import Fault
from treecast.bench.chaos.load import Load, Outcome, Work, toy_works, undisturbed
from treecast.bench.chaos.mesh import ChaosMesh, ChaosSettings
from treecast.services.local import MeshSettings

WORKERS = 8

on_one_mesh = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True)
class Bed:
    mesh: ChaosMesh
    works: list[Work]
    expected: dict[str, tuple[int, ...]]

    def load(self, **changed: tuple[int, ...]) -> Load:
        expected = self.expected | changed
        return Load(self.mesh, self.works, expected, WORKERS)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def bed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bed]:
    settings = MeshSettings(engine="toy", num_verifiers=2, speculators=("ngram",))
    works = toy_works(4, 48)
    async with ChaosMesh(ChaosSettings(settings, tmp_path_factory.mktemp("logs"))) as mesh:
        yield Bed(mesh, works, await undisturbed(mesh, works))


Hurt = Callable[[ChaosMesh, Load], Awaitable[None]]


async def survive(bed: Bed, name: str, hurt: Hurt) -> list[int]:
    """Hurt the mesh under load; returns how often each checked stream had to resume."""
    async with bed.load() as load:
        await steady(load)
        async with asyncio.timeout(60):
            row = await run_fault(bed.mesh, load, Fault(name, lambda mesh: hurt(mesh, load)))
    assert row.in_flight == WORKERS
    assert row.holds, row
    assert set(load.counts) == {Outcome.SAME}
    return [record.resumes for record in load.records]


@on_one_mesh
async def test_nothing_is_lost_or_changed_when_a_verifier_is_killed(bed: Bed) -> None:
    async def kill(mesh: ChaosMesh, load: Load) -> None:
        await mesh.kill("verifier-0")
        await mesh.restart("verifier-0")

    await survive(bed, "killed", kill)


@on_one_mesh
async def test_streams_end_elsewhere_while_their_router_hangs(bed: Bed) -> None:
    async def hang(mesh: ChaosMesh, load: Load) -> None:
        mesh.freeze("router-0")
        begun = len(load.records)
        await load.until(lambda: all(one.outcome for one in load.records[:begun]))
        mesh.thaw("router-0")

    assert any(await survive(bed, "hung", hang))


@on_one_mesh
async def test_a_changed_token_is_told_when_there_is_one(bed: Bed) -> None:
    right = bed.expected["toy-1"]
    async with bed.load(**{"toy-1": (*right[:-1], right[-1] ^ 1)}) as load:
        await load.until(lambda: load.counts[Outcome.CHANGED] > 0)
    assert {one.outcome for one in load.records if one.work != "toy-1"} == {Outcome.SAME}
    assert {one.outcome for one in load.records if one.work == "toy-1"} == {Outcome.CHANGED}


@on_one_mesh
async def test_nothing_is_held_when_all_is_quiet(bed: Bed) -> None:
    stock = await take_stock(bed.mesh)
    assert {name: one.held for name, one in stock.items()} == dict.fromkeys(stock, 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_fault_loses_and_changes_nothing() -> None:
    command = [sys.executable, "-m", "treecast.bench.chaos", "--quick"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
