"""Where `prometheus` and `promtool` are: on PATH, or unpacked from Debian's package once.

Unpacked and not installed: no service is started, nothing outside our cache changes, and only a
machine without package lists needs root, to fetch them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from treecast.checkpoints import default_cache_dir
from treecast.errors import TreecastError

PACKAGE = "prometheus"


class PrometheusMissing(TreecastError):
    """There is no Prometheus, and it cannot be had here."""

    reason = "PROMETHEUS_MISSING"


@dataclass(frozen=True, slots=True)
class Binaries:
    prometheus: str
    promtool: str


def find_prometheus(cache: Path | None = None) -> Binaries:
    """Find both programs, fetching them if need be. Blocks; safe from several processes at once.

    Raises:
        PrometheusMissing: neither on PATH nor to be had from Debian's archive; says why.
    """
    server, tool = shutil.which("prometheus"), shutil.which("promtool")
    if server and tool:
        return Binaries(server, tool)
    folder = (cache or default_cache_dir()) / PACKAGE
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _unpack(folder)
    programs = folder / "usr" / "bin"
    return Binaries(str(programs / "prometheus"), str(programs / "promtool"))


def _unpack(folder: Path) -> None:
    """Appears whole or not at all."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise PrometheusMissing("prometheus is not on PATH, and this is no Debian to get it from")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        package = _download(Path(scratch))
        unpacked = Path(scratch) / "unpacked"
        _run(["dpkg-deb", "-x", str(package), str(unpacked)], scratch)
        unpacked.rename(folder)


def _download(folder: Path) -> Path:
    try:
        _run(["apt-get", "download", "-q", PACKAGE], folder)
    except PrometheusMissing:
        if os.geteuid() != 0:
            raise
        _run(["apt-get", "update", "-q"], folder)
        _run(["apt-get", "download", "-q", PACKAGE], folder)
    [package] = folder.glob("*.deb")
    return package


def _run(command: list[str], folder: str | Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        why = said[-1] if said else f"status {done.returncode}"
        raise PrometheusMissing(
            f"prometheus is not on PATH, and {' '.join(command[:2])} failed: {why}"
        )
