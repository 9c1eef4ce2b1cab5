"""One service as a child process: started, announced, watched, stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import ClassVar

from treecast import lifeline
from treecast.errors import TreecastError
from treecast.settings import ENV_PREFIX

LOG_TAIL_LINES = 12
_KEPT_VARIABLES = ("TREECAST_HOME",)


class MeshError(TreecastError):
    """A process of the local mesh did not start, or ended when it should not have."""

    reason: ClassVar[str] = "MESH_FAILED"


class Spawner:
    """Starts processes from one thread that lives as long as they should.

    The kernel's parent-death signal counts the *thread* that forked as the parent. Were a process
    started from a thread that ends, a pool's for instance, it would be killed with that thread.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spawner")

    def start(
        self, command: Sequence[str], environment: Mapping[str, str], log_path: Path
    ) -> subprocess.Popen[bytes]:
        """Start a command whose stdout is piped to us and whose stderr is appended to the log."""
        return self._thread.submit(_popen, command, environment, log_path).result()

    def close(self) -> None:
        """End the thread, and with it, by signal, whatever it started that still runs."""
        self._thread.shutdown()


class ServiceProcess:
    """A child process that says on stdout, with one line of JSON, where it is to be found.

    Attributes:
        name: its role, and a number where there are several: "router", "verifier-0".
        announcement: what it printed when it was ready; empty until then.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log_path: Path,
        spawner: Spawner,
    ) -> None:
        self.name = name
        self.command = tuple(command)
        self.log_path = log_path
        self._environment = environment
        self._announced: Future[dict[str, object]] = Future()
        self._popen = spawner.start(command, environment, log_path)
        self._reader = threading.Thread(target=self._read_stdout, name=f"stdout of {name}")
        self._reader.daemon = True
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def address(self) -> str:
        """host:port of its gRPC server. Call it only once ready."""
        return str(self._announced.result(timeout=0)["address"])

    @property
    def metrics_address(self) -> str | None:
        """host:port of `/metrics`, if it serves any. Call it only once ready."""
        metrics = self._announced.result(timeout=0).get("metrics")
        return str(metrics) if metrics else None

    @property
    def http_address(self) -> str | None:
        """host:port of its OpenAI-compatible API, if it serves any. Call it only once ready."""
        http = self._announced.result(timeout=0).get("http")
        return str(http) if http else None

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def wait_ready(self, timeout_s: float) -> None:
        """Block until the process has announced itself.

        Raises:
            MeshError: it ended before, or took too long; the message ends with its log's tail.
        """
        try:
            self._announced.result(timeout_s)
        except FutureTimeoutError:
            raise self.failure(f"was not ready within {timeout_s:g} s") from None

    def failure(self, what: str) -> MeshError:
        """An error that says what happened to the process, with the last lines of its log."""
        return MeshError(f"{self.name} {what}; the end of {self.log_path}:\n{tail(self.log_path)}")

    def on_exit(self, callback: Callable[[ServiceProcess], None]) -> None:
        """Call back from a thread of its own once the process has ended."""

        def watch() -> None:
            self._popen.wait()
            callback(self)

        threading.Thread(target=watch, name=f"watch {self.name}", daemon=True).start()

    def exit_message(self) -> str:
        code = self._popen.poll()
        if code is not None and code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"exited with status {code}"

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        self._popen.send_signal(number)

    def kill(self) -> None:
        """End the process as `kill -9` does, and wait until it is gone."""
        self._popen.kill()
        self._popen.wait()

    def stop(self, grace_s: float) -> None:
        """Ask the process to end, insist after `grace_s` seconds, and wait until it is gone."""
        self._popen.terminate()
        try:
            self._popen.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reader.join()

    def _read_stdout(self) -> None:
        """The first line of JSON is the announcement; all else goes to the log."""
        assert self._popen.stdout is not None
        with self._popen.stdout as stdout, self.log_path.open("ab") as log:
            for line in stdout:
                if self._announced.done() or not self._announce(line):
                    log.write(line)
                    log.flush()
        if not self._announced.done():
            self._popen.wait()
            self._announced.set_exception(
                self.failure(f"{self.exit_message()} before it was ready")
            )

    def _announce(self, line: bytes) -> bool:
        try:
            announcement = json.loads(line)
        except ValueError:
            return False
        if not isinstance(announcement, dict) or "address" not in announcement:
            return False
        self._announced.set_result(announcement)
        return True


def service_command(role: str, flags: Mapping[str, object]) -> list[str]:
    """`python -m treecast.services.<role> --announce` and flags by field name; None is left out."""
    command = [sys.executable, "-m", f"treecast.services.{role}", "--announce"]
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            command.append(f"--{flag}={value}")
    return command


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Our environment without the settings in it: a child is told everything by flags.

    A variable such as TREECAST_MODEL is meant for one service, and all of them would read it.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(ENV_PREFIX) or name in _KEPT_VARIABLES
    }
    return kept | dict(extra)


def tail(path: Path, lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a text file; says so if there are none."""
    try:
        with path.open(errors="replace") as log:
            return "".join(deque(log, lines)).rstrip() or "(empty)"
    except OSError as error:
        return f"({error.strerror})"


def _popen(
    command: Sequence[str], environment: Mapping[str, str], log_path: Path
) -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-I", "-S", lifeline.__file__, str(os.getpid())]
    with log_path.open("ab") as log:
        return subprocess.Popen(
            [*launcher, *command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            # Out of the terminal's process group: Ctrl-C is for us, and we stop them in order.
            start_new_session=True,
        )
