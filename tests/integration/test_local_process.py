"""Child processes of a local mesh: announced, watched, stopped, and never left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from treecast.services.local.logs import KEPT_MESHES, new_log_dir
from treecast.services.local.process import (
    MeshError,
    ServiceProcess,
    Spawner,
    child_environment,
    service_command,
)
from treecast.services.local.valkey import start_valkey

Start = Callable[[str], ServiceProcess]

READY = """
import json, sys
print("loading", flush=True)
print(json.dumps({"role": "toy", "address": "127.0.0.1:1", "metrics": "127.0.0.1:2"}), flush=True)
"""
WAIT = READY + "import signal; signal.pause()"
STUBBORN = (
    READY
    + "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    + ("print('deaf', flush=True)\nwhile True: signal.pause()")
)
BROKEN = "import sys; print('no such model', file=sys.stderr); sys.exit(2)"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    spawner, processes = Spawner(), []

    def start(script: str) -> ServiceProcess:
        command = [sys.executable, "-c", script]
        log = tmp_path / "toy.log"
        processes.append(ServiceProcess("toy", command, child_environment({}), log, spawner))
        return processes[-1]

    yield start
    for process in processes:
        process.stop(5)
    spawner.close()


def test_a_process_says_where_it_is_when_it_is_ready(start):
    process = start(WAIT)
    process.wait_ready(30)
    assert (process.address, process.metrics_address) == ("127.0.0.1:1", "127.0.0.1:2")
    assert process.running
    assert process.log_path.read_text() == "loading\n"


def test_the_error_carries_the_log_when_a_process_ends_before_it_is_ready(start):
    process = start(BROKEN)
    with pytest.raises(MeshError) as caught:
        process.wait_ready(30)
    assert caught.value.message == (
        f"toy exited with status 2 before it was ready; the end of {process.log_path}:\n"
        "no such model"
    )


def test_the_error_says_so_when_a_process_is_never_ready(start):
    process = start("import signal; signal.pause()")
    with pytest.raises(MeshError, match=r"toy was not ready within 0.1 s; .*\n\(empty\)"):
        process.wait_ready(0.1)


def test_a_process_is_killed_when_it_does_not_end_by_itself(start):
    process = start(STUBBORN)
    process.wait_ready(30)
    while "deaf" not in process.log_path.read_text():
        pass
    process.stop(0.1)
    assert process.exit_message() == "was ended by SIGKILL"


def test_whoever_watches_is_told_when_a_process_ends(start):
    process, ended = start(WAIT), threading.Event()
    process.wait_ready(30)
    process.on_exit(lambda gone: ended.set())
    assert not ended.is_set()
    process.kill()
    assert ended.wait(5)
    assert not process.running


def test_the_child_dies_when_its_parent_is_killed(tmp_path):
    """The parent prints its child's pid and hangs; kill -9 leaves it no chance to clean up."""
    script = f"""
import sys
from pathlib import Path
from treecast.services.local.process import ServiceProcess, Spawner, child_environment
command, log = [sys.executable, "-c", {WAIT!r}], Path({str(tmp_path)!r}) / "log"
process = ServiceProcess("toy", command, child_environment({{}}), log, Spawner())
process.wait_ready(30)
print(process.pid, flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    assert wait_for_end(child, 10)


def test_a_child_started_from_a_thread_lives_on_when_that_thread_ends(start):
    started: list[ServiceProcess] = []
    thread = threading.Thread(target=lambda: started.append(start(WAIT)))
    thread.start()
    thread.join()
    started[0].wait_ready(30)
    child = os.pidfd_open(started[0].pid)
    assert not wait_for_end(child, 0.2)


def test_a_signal_to_our_process_group_spares_the_children(start):
    process = start(WAIT)
    process.wait_ready(30)
    assert os.getpgid(process.pid) != os.getpgid(0)


def test_children_do_not_see_our_settings_when_the_environment_has_some(monkeypatch):
    monkeypatch.setenv("TREECAST_MODEL", "mine")
    monkeypatch.setenv("TREECAST_HOME", "/cache")
    environment = child_environment({"OMP_NUM_THREADS": "2"})
    assert "TREECAST_MODEL" not in environment
    assert (environment["TREECAST_HOME"], environment["OMP_NUM_THREADS"]) == ("/cache", "2")


def test_flags_are_written_as_the_services_read_them():
    flags = {"redis_url": "redis://a", "model": None, "shares_cores": False, "announce_me": True}
    assert service_command("router", {**flags, "drain_s": 0})[1:] == [
        *("-m", "treecast.services.router", "--announce", "--redis-url=redis://a"),
        *("--no-shares-cores", "--announce-me", "--drain-s=0"),
    ]


def test_valkey_answers_when_it_is_started(tmp_path):
    spawner = Spawner()
    process, url = start_valkey(tmp_path / "valkey.log", spawner)
    with redis.Redis.from_url(url) as client:
        assert client.eval("return 7", 0) == 7
    process.stop(5)
    spawner.close()
    assert process.exit_message() == "exited with status 0"


def test_old_log_folders_go_when_there_are_too_many(tmp_path):
    folders = [new_log_dir(tmp_path) for _ in range(KEPT_MESHES + 2)]
    assert len(set(folders)) == KEPT_MESHES + 2
    assert len(list(tmp_path.iterdir())) == KEPT_MESHES
    assert folders[-1].is_dir()


def wait_for_end(pidfd: int, timeout_s: float) -> bool:
    """Whether the process behind a pidfd ends in time; closes it."""
    import select

    try:
        return bool(select.select([pidfd], [], [], timeout_s)[0])
    finally:
        os.close(pidfd)
