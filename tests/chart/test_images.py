"""Dockerfiles: the linter's word, what they are built from, and their steps run for real."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .helm import ROOT

IMAGES = ROOT / "deploy" / "images"
DOCKERFILES = tuple(sorted(IMAGES.glob("*.Dockerfile")))
HADOLINT = Path(sys.executable).parent / "hadolint"


def name(file: Path) -> str:
    return file.stem


def instructions(text: str) -> list[str]:
    """One line each; comments gone."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return [line.strip() for line in re.sub(r"\\\n\s*", "", kept).splitlines() if line.strip()]


def users(text: str) -> list[str]:
    return [line.split()[1] for line in instructions(text) if line.startswith("USER ")]


def lint(text: str) -> str:
    """The linter's complaints; nothing is well."""
    command = [HADOLINT, "--no-color", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return done.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=name)
def test_the_linter_is_content_when_it_reads_a_dockerfile(file: Path) -> None:
    assert lint(file.read_text()) == ""


def test_the_linter_complains_when_a_base_has_no_version() -> None:
    text = (IMAGES / "router.Dockerfile").read_text()
    assert "DL3006" in lint(text.replace("FROM ${PYTHON}\n", "FROM python\n"))


@pytest.mark.parametrize("file", DOCKERFILES, ids=name)
def test_images_are_pinned_and_not_roots_when_built(file: Path) -> None:
    text = file.read_text()
    for base in re.findall(r"^ARG (?:PYTHON|ENGINE)=(\S+)", text, re.MULTILINE):
        assert re.search(r":(\d+\.\d+\.\d+\S*|cpu)$", base), base
    whose = users(text) or users((IMAGES / "engine.Dockerfile").read_text())
    assert whose[-1] == "10001:10001"
    assert "HEALTHCHECK" not in text
    assert not re.search(r"^ADD ", text, re.MULTILINE)


def test_only_the_engine_images_have_torch_when_built() -> None:
    assert "torch" not in "".join(instructions((IMAGES / "router.Dockerfile").read_text()))


# --- the steps, run ------------------------------------------------------------------------------


def context_files() -> Iterator[Path]:
    """What .dockerignore lets into the build, of the files that git knows."""
    lines = (ROOT / ".dockerignore").read_text().split()
    allowed = [line[1:] for line in lines if line.startswith("!")]
    denied = [line for line in lines[lines.index("*") + 1 :] if not line.startswith(("!", "#"))]
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for text in filter(None, listed.split("\0")):
        inside = any(text == entry or text.startswith(f"{entry}/") for entry in allowed)
        if inside and not any(fnmatch.fnmatch(text, f"{pattern}*") for pattern in denied):
            yield Path(text)


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """A build context, as the builder would send it."""
    folder = tmp_path / "context"
    for file in context_files():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file, follow_symlinks=False)
    return folder


def build(dockerfile: str, context: Path, prefix: Path) -> None:
    """Run the RUN steps of the stage `build` in a folder, with /opt/treecast elsewhere."""
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    environment = {"PATH": os.environ["PATH"], "HOME": str(prefix.parent), **pip}
    stage = ""
    for line in instructions((IMAGES / f"{dockerfile}.Dockerfile").read_text()):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            stage = rest.partition(" AS ")[2]
        if stage != "build":
            continue
        if word == "ARG":
            key, _, default = rest.partition("=")
            environment.setdefault(key, default)
        if word == "RUN":
            command = rest.replace("/opt/treecast", str(prefix)).replace(
                "python -m", f"{sys.executable} -m"
            )
            done = subprocess.run(
                ["sh", "-ec", command],
                cwd=context,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


def run(prefix: Path, *arguments: str) -> str:
    environment = {"PATH": f"{prefix}/bin:/usr/bin:/bin", "HOME": str(prefix.parent)}
    done = subprocess.run(
        arguments, env=environment, cwd=prefix, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def entrypoint(dockerfile: str) -> list[str]:
    """What the image runs, as a list."""
    text = (IMAGES / f"{dockerfile}.Dockerfile").read_text()
    (line,) = re.findall(r"^ENTRYPOINT (\[.*\])$", text, re.MULTILINE)
    return [str(word) for word in json.loads(line)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_router_starts_without_torch_when_its_steps_are_run(
    context: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "treecast"
    build("router", context, prefix)
    assert "--verifiers" in run(prefix, *entrypoint("router"), "--help")
    assert "generate" in run(prefix, "treecast", "--help")
    listed = run(prefix, "pip", "list", "--format=freeze")
    assert "torch==" not in listed
    assert "numpy==" in listed


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_engine_serves_both_workers_when_its_steps_are_run(
    context: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "treecast"
    build("engine", context, prefix)
    for role in ("verifier", "speculator"):
        assert "--torch-threads" in run(prefix, *entrypoint(role), "--help")
    code = "import torch; from treecast.checkpoints import shipped_draft_weights as w; print(w())"
    assert "smollm2-135m-draft" in run(prefix, "python", "-c", code)
