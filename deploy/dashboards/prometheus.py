"""A real Prometheus as a child process: scrapes what it is told to, answers queries."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from treecast.errors import TreecastError

from .debian import Binaries

_READY_S = 30.0
_STOP_S = 10.0
_LISTENING = re.compile(r'msg="Listening on" address=(\S+)')


class PrometheusError(TreecastError):
    """Prometheus did not start, or refused a query; the message is its own."""

    reason = "PROMETHEUS_FAILED"


@dataclass(frozen=True, slots=True)
class Series:
    """One series of an answer: times in seconds since the epoch."""

    labels: Mapping[str, str]
    times: tuple[float, ...]
    values: tuple[float, ...]


class Prometheus:
    """A context manager; every call blocks. Listens on 127.0.0.1 only.

    It has scraped every target once when the context begins.

    Attributes:
        targets: address of each `/metrics` by the `pod` label that it gets.
    """

    def __init__(
        self,
        binaries: Binaries,
        targets: Mapping[str, str],
        interval_s: float = 1.0,
        rules: str = "",
    ) -> None:
        self.targets = dict(targets)
        self._binaries = binaries
        self._interval_s = interval_s
        self._rules = rules
        self._folder = tempfile.TemporaryDirectory(prefix="treecast-prometheus-")
        self._process: subprocess.Popen[bytes] | None = None
        self._address = ""

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop it and forget its data. Safe to repeat."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        self._folder.cleanup()

    # --- queries ----------------------------------------------------------------------------

    def instant(self, expr: str) -> list[Series]:
        """What an expression is now.

        Raises:
            PrometheusError: it does not parse or cannot be evaluated.
        """
        found = self._ask("query", query=expr)["result"]
        return [_series(one["metric"], [one["value"]]) for one in found]

    def range(self, expr: str, start_s: float, end_s: float, step_s: float) -> list[Series]:
        """What an expression was, at each step of a time span.

        Raises:
            PrometheusError: it does not parse or cannot be evaluated.
        """
        found = self._ask("query_range", query=expr, start=start_s, end=end_s, step=step_s)
        return [_series(one["metric"], one["values"]) for one in found["result"]]

    def metric_names(self) -> frozenset[str]:
        """Names of all series that were ever scraped."""
        return frozenset(self._ask("label/__name__/values"))

    def wait_for(self, expr: str, timeout_s: float = 30.0) -> None:
        """Block until an expression returns something.

        Raises:
            PrometheusError: it did not in time.
        """
        deadline = time.monotonic() + timeout_s
        while not self.instant(expr):
            if time.monotonic() > deadline:
                raise PrometheusError(f"{expr} returned nothing for {timeout_s:g} s")
            time.sleep(self._interval_s / 4)

    def _ask(self, what: str, **parameters: object) -> Any:
        """Any: Prometheus' JSON."""
        query = urllib.parse.urlencode(parameters)
        url = f"http://{self._address}/api/v1/{what}?{query}"
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            with error:
                said = json.loads(error.read() or b"{}")
            raise PrometheusError(str(said.get("error", error))) from error

    # --- life-cycle -------------------------------------------------------------------------

    def _start(self) -> None:
        folder = Path(self._folder.name)
        (folder / "rules.yaml").write_text(self._rules or "groups: []\n")
        (folder / "prometheus.yml").write_text(yaml.safe_dump(self._configuration()))
        log = folder / "log"
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(self._command(folder), stderr=stderr, cwd=folder)
        self._address = self._wait_listening(log)
        self.wait_for(f"count(up == 1) == {len(self.targets)}")

    def _configuration(self) -> dict[str, object]:
        every = f"{round(1000 * self._interval_s)}ms"
        jobs = [
            {"targets": [address], "labels": {"pod": pod}} for pod, address in self.targets.items()
        ]
        return {
            "global": {
                "scrape_interval": every,
                "scrape_timeout": every,
                "evaluation_interval": every,
            },
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": "treecast", "static_configs": jobs}],
        }

    def _command(self, folder: Path) -> Sequence[str]:
        return [
            self._binaries.prometheus,
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            "--web.listen-address=127.0.0.1:0",
        ]

    def _wait_listening(self, log: Path) -> str:
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            text = log.read_text(errors="replace")
            if "Server is ready" in text and (found := _LISTENING.search(text)):
                return found[1]
            if self._process is None or self._process.poll() is not None:
                raise PrometheusError(f"prometheus ended: {text[-1000:]}")
            time.sleep(0.02)
        raise PrometheusError(f"prometheus was not ready within {_READY_S:g} s")


def _series(labels: Mapping[str, str], points: Sequence[tuple[float, str]]) -> Series:
    return Series(labels, tuple(p[0] for p in points), tuple(float(p[1]) for p in points))
