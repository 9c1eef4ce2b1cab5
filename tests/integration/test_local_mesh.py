"""The whole mesh as processes, with the toy engine: whole, used, hurt and stopped."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from treecast import Client, SamplingParams
from treecast.checkpoints import DEFAULT_TARGET
from treecast.cli.up import client_environment
from treecast.client import FinishReason, RetryPolicy
from treecast.errors import Unauthenticated, Unavailable
from treecast.services.local import LocalMesh, MeshError, MeshSettings
from treecast.services.local.folders import default_folders
from treecast.services.router.keys import entry_of

TREECAST = [sys.executable, "-m", "treecast.cli"]
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
PROMPT = [5, 6, 7]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREECAST_HOME", str(tmp_path_factory.mktemp("home")))


def toy(log_dir: Path, **changes: object) -> MeshSettings:
    return MeshSettings(engine="toy", torch_threads=1, log_dir=log_dir, **changes)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    slow = {"toy_step_s": 0.02}  # so that waiting for trees is worth it
    with LocalMesh(toy(tmp_path_factory.mktemp("logs"), verifier_flags=slow)) as mesh:
        yield mesh


def test_the_mesh_answers_in_fewer_steps_when_it_speculates(mesh):
    with Client(mesh.router_address) as client:
        plain = client.generate(PROMPT, GREEDY, max_nodes=0).result()
        trees = client.generate(PROMPT, GREEDY).result()
    assert len(plain.token_ids) == 40
    assert plain.finish_reason is FinishReason.LENGTH
    assert plain.usage.steps == 40
    assert trees.token_ids == plain.token_ids
    assert trees.usage.steps < 40
    assert trees.usage.accepted == 40 - trees.usage.steps


def test_every_process_serves_metrics_when_the_mesh_is_whole(mesh):
    for name in ("router", "verifier-0", "ssm", "ngram"):
        url = f"http://{mesh.processes[name].metrics_address}/metrics"
        with urllib.request.urlopen(url, timeout=5) as reply:
            assert b"treecast_" in reply.read()


def test_the_router_sees_all_of_it_when_the_mesh_is_whole(mesh):
    with Client(mesh.router_address) as client:
        status = client.status()
    assert status.redis_ok
    (verifier,) = status.verifiers
    assert verifier.healthy
    assert verifier.address == mesh.processes["verifier-0"].address
    assert len(verifier.speculators) == 2


def test_a_plaintext_mesh_is_whole_when_the_environment_names_certificates(mesh, monkeypatch):
    monkeypatch.setenv("TREECAST_TLS_CA", "/none/ca.pem")
    mesh.wait_whole(10)
    with Client(mesh.router_address, tls=mesh.client_files) as client:
        assert client.models()


def test_nothing_is_left_when_the_mesh_is_stopped(tmp_path):
    settings = toy(tmp_path, speculators=("ngram",))
    with LocalMesh(settings) as mesh:
        processes = dict(mesh.processes)
    assert set(processes) == {"valkey", "ngram", "verifier-0", "router"}
    assert {name: process.exit_message() for name, process in processes.items()} == dict.fromkeys(
        processes, "exited with status 0"
    )


@pytest.mark.slow
def test_every_speculator_runs_when_several_are_of_one_kind(tmp_path):
    settings = toy(tmp_path, speculators=("ssm", "ngram", "ssm"))
    with LocalMesh(settings) as mesh, Client(mesh.router_address) as client:
        assert set(mesh.processes) == {"valkey", "ssm-0", "ssm-1", "ngram", "verifier-0", "router"}
        (verifier,) = client.status().verifiers
        assert len(verifier.speculators) == 3
        processes = dict(mesh.processes)
    assert not any(process.running for process in processes.values())


def test_the_mesh_tells_why_when_a_process_cannot_start(tmp_path):
    settings = toy(tmp_path, speculators=(), verifier_flags={"pool_tokens": 1})
    mesh = LocalMesh(settings)
    with pytest.raises(MeshError, match=r"verifier-0 exited with status 2 before it was ready"):
        mesh.start()
    assert not any(process.running for process in mesh.processes.values())
    assert "pool_tokens" in (tmp_path / "verifier-0.log").read_text().replace("-", "_")


@pytest.mark.slow
def test_the_default_draft_is_left_out_when_the_model_is_another(tmp_path):
    told: list[tuple[str, str]] = []
    settings = MeshSettings(model=str(tmp_path / "other"), log_dir=tmp_path)
    mesh = LocalMesh(settings, lambda name, state: told.append((name, state)))
    with pytest.raises(MeshError, match=f"model folder {tmp_path}/other does not exist"):
        mesh.start()
    why = "left out, since the default draft does not fit another model"
    assert ("ssm", why) in told
    assert set(mesh.processes) == {"valkey", "ngram", "verifier-0"}


def test_the_defaults_are_found_when_they_were_unpacked_before(tmp_path):
    made = Path(os.environ["TREECAST_HOME"]) / DEFAULT_TARGET
    made.mkdir()
    log = tmp_path / "models.log"
    assert default_folders(["model"], log, lambda kind, doing: None) == {"model": made}


def test_unpacking_tells_why_when_it_ends_early(tmp_path):
    log = tmp_path / "models.log"
    with pytest.raises(MeshError, match=r"unpacking exited with status 1; .*\n(.|\n)*KeyError"):
        default_folders(["unknown"], log, lambda kind, doing: None)


def test_the_text_goes_on_when_the_router_is_killed_and_comes_back(tmp_path):
    settings = toy(tmp_path, speculators=(), verifier_flags={"toy_step_s": 0.01})
    sampling = SamplingParams(temperature=0.8, seed=3, max_tokens=60, ignore_eos=True)
    with LocalMesh(settings) as mesh, Client(mesh.router_address) as client:
        undisturbed = client.generate(PROMPT, sampling).result()
        stream = client.generate(PROMPT, sampling)
        next(stream)
        mesh.processes["router"].kill()
        mesh.restart("router")
        result = stream.result()
    assert result.token_ids == undisturbed.token_ids
    assert result.resumes >= 1


@pytest.fixture
def up(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`treecast up` with the toy engine, as a user starts it."""
    process = subprocess.Popen(
        [*TREECAST, "up", "--engine", "toy", "--threads", "1", "--listen", "127.0.0.1:0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"TREECAST_HOME": str(tmp_path)},
    )
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_up_stops_everything_when_it_is_interrupted(up, number):
    document = announced(up)
    children = [os.pidfd_open(pid) for pid in document["pids"].values()]
    generate = ["generate", "--token-ids", "5,6", "-n", "4", "--json", "-r", document["router"]]
    generated = subprocess.run([*TREECAST, *generate], capture_output=True, check=True)
    assert (
        json.loads(generated.stdout.splitlines()[-1])["samples"][0]["usage"]["output_tokens"] == 4
    )
    up.send_signal(number)
    _, errors = up.communicate(timeout=60)
    assert up.returncode == 130
    assert errors.endswith(b"treecast: interrupted\n")
    assert all(has_ended(child, 0) for child in children)


def test_no_process_is_left_when_up_is_killed(up):
    children = [os.pidfd_open(pid) for pid in announced(up)["pids"].values()]
    up.kill()
    assert all(has_ended(child, 10) for child in children)


def test_up_ends_with_the_log_when_its_router_dies(up):
    document = announced(up)
    os.kill(document["pids"]["router"], signal.SIGKILL)
    _, errors = up.communicate(timeout=60)
    assert up.returncode == 1
    assert b"treecast: router was ended by SIGKILL; the end of " in errors


def announced(up: subprocess.Popen[bytes]) -> dict:
    assert up.stdout is not None
    line = up.stdout.readline()
    assert line, up.communicate()[1].decode()
    return json.loads(line)


def has_ended(pidfd: int, timeout_s: float) -> bool:
    """Whether the process behind a pidfd ends in time; closes it."""
    try:
        return bool(select.select([pidfd], [], [], timeout_s)[0])
    finally:
        os.close(pidfd)


@pytest.mark.slow
def test_mesh_with_tls_and_keys_serves_those_who_have_both(tmp_path, monkeypatch):
    keys = tmp_path / "keys.toml"
    keys.write_text(entry_of("tc_admin", "ops", {}, admin=True))
    monkeypatch.setenv("TREECAST_API_KEY", "tc_admin")
    settings = toy(tmp_path, tls=True, speculators=("ngram",), router_flags={"api_keys_file": keys})
    with LocalMesh(settings) as mesh:
        ours = mesh.certificates["client"]
        with Client(mesh.router_address, tls=ours) as client:
            assert len(client.generate(PROMPT, GREEDY).result().token_ids) == 40
        once = RetryPolicy(attempts_to_start=1)
        with Client(mesh.router_address, once) as plaintext, pytest.raises(Unavailable):
            plaintext.status()
        unknown = Client(mesh.router_address, once, tls=ours, api_key="tc_no")
        with unknown, pytest.raises(Unauthenticated, match=r"^API key is unknown$"):
            unknown.status()
        variables = client_environment(mesh)
        drained = subprocess.run(
            [*TREECAST, "drain", "-r", mesh.router_address, "--wait"],
            capture_output=True,
            check=True,
            env=os.environ | variables,
        )
        assert drained.stdout == b"draining, 0 running\n"


def test_mesh_starts_a_valkey_when_the_environment_names_another(tmp_path, own_redis, monkeypatch):
    monkeypatch.setenv("TREECAST_REDIS_URL", own_redis.url)
    with LocalMesh(toy(tmp_path, speculators=())) as mesh:
        assert mesh.processes["valkey"].running
        assert mesh.redis_url != own_redis.url


def test_no_password_is_in_a_childs_command_or_log(tmp_path, own_redis):
    url = f"{own_redis.url}?password=hunter2"  # the server has none, so Redis counts as lost
    with LocalMesh(toy(tmp_path, speculators=(), redis_url=url)) as mesh:
        commands = [" ".join(process.command) for process in mesh.processes.values()]
        logs = [log.read_text() for log in tmp_path.glob("*.log")]
    assert "hunter2" not in str(commands) + str(logs)
