"""Open-loop load and the profile of a mesh, with the toy engine through real ports."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from tests.scripted_router import ScriptedRouter, finished, play, started
from treecast.bench.arrival_plots import draw_arrivals
from treecast.bench.arrivals import Answer, Load, Poisson, offer
from treecast.bench.mesh_phases import MESH_PHASES, REMAINDER, profile_mesh
from treecast.cli import bench_arrivals, bench_profile
from treecast.cli.app import app
from treecast.client import Client, SamplingParams, TlsFiles
from treecast.engine.loading import resolve_dtype
from treecast.errors import InvalidRequest
from treecast.sampling.params import Law, Proposal, SpeculationParams
from treecast.services.local.mesh import LocalMesh
from treecast.services.local.settings import MeshSettings
from treecast.wire import codec

STEP_S = 0.005
PLAIN = SpeculationParams(max_nodes=0)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    settings = MeshSettings(
        engine="toy",
        speculators=(),
        log_dir=tmp_path_factory.mktemp("logs"),
        verifier_flags={"toy_step_s": STEP_S, "max_running": 1},
    )
    with LocalMesh(settings) as mesh:
        yield mesh


def test_waiting_counts_from_the_planned_arrival(mesh: LocalMesh) -> None:
    tokens = 16
    answers = asyncio.run(offer(mesh.router_address, [[5, 6, 7]], [0.0, 0.0, 0.0], tokens, PLAIN))
    assert [one.error for one in answers] == ["", "", ""]
    assert [one.num_tokens for one in answers] == [tokens] * 3
    # One request at a time: the last of three waits for the other two.
    firsts = sorted(one.first_s - one.planned_s for one in answers if one.first_s is not None)
    assert firsts[2] > 2 * tokens * STEP_S


def test_a_request_that_fails_is_counted(mesh: LocalMesh) -> None:
    answers = asyncio.run(offer(mesh.router_address, [[5, 10**6]], [0.0], 4, PLAIN))
    summary = Load(1, answers).summary()
    assert (summary.offered, summary.failed) == (1, 1)
    assert summary.latency_ms == {}


def test_a_load_is_speculated_on_as_asked() -> None:
    asked = SpeculationParams(Law.MSS, Proposal.IID, "<1,2>", 7)
    with ScriptedRouter(play(started(), finished(0))) as router:
        asyncio.run(offer(router.address, [[5]], [0.0], 4, asked))
    (request,) = router.requests
    assert codec.decode_speculation(request, request.max_nodes) == asked


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedRouter]:
    """A router that stands for the mesh of any command; its model has a chat template."""
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    with ScriptedRouter(play(started(), finished(0))) as router:

        @contextmanager
        def running_mesh(settings: MeshSettings) -> Iterator[SimpleNamespace]:
            ran = replace(settings, model=str(tmp_path), draft="/models/draft")
            yield SimpleNamespace(
                router_address=router.address, client_files=TlsFiles(), settings=ran
            )

        for module in (bench_arrivals, bench_profile):
            monkeypatch.setattr(module, "running_mesh", running_mesh)
        yield router


def roles_asked(router: ScriptedRouter) -> set[str]:
    return {message.role for request in router.requests for message in request.chat.messages}


def test_a_load_says_what_was_measured_and_asks_in_chats(
    asked: ScriptedRouter, tmp_path: Path
) -> None:
    said = {
        "contenders": "treecast-plain",
        "seconds": 1.0,
        "seed": 7,
        "max_tokens": 4,
        "planner": "full",
        "law": "mss",
        "proposal": "iid",
        "growth": "<1,2>",
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in said.items()]
    command = ["bench", "--arrivals=poisson:9", "--levels=1", "--json", *flags]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    said["contender"] = said.pop("contenders")
    assert json.loads(done.stdout)["settings"] == said | {
        "model": tmp_path.name,
        "draft": "draft",
        "dtype": resolve_dtype("auto", "cpu"),
        "weights": "auto",
        "numerics": "exact",
        "device": "cpu",
        "threads": 2,
        "speculators": ["ssm", "ngram"],
    }
    assert len(asked.requests) > 1
    assert roles_asked(asked) == {"user"}


def test_a_profile_asks_in_chats(
    asked: ScriptedRouter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("treecast.bench.mesh_phases.profile_mesh", lambda mesh, run: run())
    options = {"prompts": None, "limit": 3, "max_tokens": 4}
    bench_profile._profile_mesh(MeshSettings(), tmp_path, options)
    assert len(asked.requests) == 4
    assert roles_asked(asked) == {"user"}


def test_a_meshs_phases_add_up_to_what_its_client_saw(mesh: LocalMesh) -> None:
    with Client(mesh.router_address) as client:

        def answer() -> None:
            client.generate(
                [5, 6, 7], SamplingParams(temperature=0, max_tokens=20), max_nodes=0
            ).result()

        found = profile_mesh(mesh, answer)
    assert set(found.phases_ms) == {*MESH_PHASES, REMAINDER}
    assert sum(found.phases_ms.values()) == pytest.approx(found.wall_ms)
    assert found.steps >= 20
    assert found.phases_ms["forward"] >= 1000 * STEP_S


def test_arrivals_are_a_poisson_process_that_a_seed_repeats() -> None:
    planned = Poisson(50.0).plan(100.0, seed=1)
    assert planned == Poisson(50.0).plan(100.0, seed=1) != Poisson(50.0).plan(100.0, seed=2)
    assert planned == sorted(planned)
    assert planned[0] > 0
    assert planned[-1] < 100
    # 5000 +- 71 (standard deviation); gaps' deviation equals their mean.
    assert 4700 < len(planned) < 5300
    gaps = [after - before for before, after in pairwise(planned)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert 0.9 < deviation / mean < 1.1


@pytest.mark.parametrize("text", ["even:3", "poisson", "poisson:0", "poisson:x", "poisson:inf"])
def test_arrivals_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="poisson:RATE"):
        Poisson.parse(text)


def test_latencies_are_drawn(tmp_path: Path) -> None:
    answers = [Answer(0.0, 0.0, 0.5, 1.5, 11), Answer(1.0, 1.0, None, 2.0, 0, "OVERLOADED: full")]
    summaries = [Load(level, answers).summary() for level in (1, 2)]
    assert summaries[0].latency_ms[50] == pytest.approx(1500)
    assert summaries[0].per_token_ms[50] == pytest.approx(100)
    assert summaries[0].failed == 1
    draw_arrivals(summaries, "poisson:1", tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
