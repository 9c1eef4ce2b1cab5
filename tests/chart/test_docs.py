"""The walk in docs/kubernetes.md: its commands, run as far as they go without a cluster."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from treecast.services.local import LocalMesh, MeshSettings

from .helm import CHART, ROOT, Manifest, run_helm
from .manifests import name_of, pods
from .test_images import IMAGES, instructions

WALK = (ROOT / "docs" / "kubernetes.md").read_text()
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```sh\n(.*?)```", WALK, re.DOTALL)
    for line in block.splitlines()
]
ONLY_WITH_A_CLUSTER = {"--create-namespace", "--reuse-values"}


def commands(*start: str) -> list[list[str]]:
    return [command for command in COMMANDS if command[: len(start)] == list(start)]


def as_template(command: list[str]) -> list[Manifest]:
    """What `helm install` or `helm upgrade` would send."""
    flags = [word for word in command[2:] if word not in ONLY_WITH_A_CLUSTER]
    return [m for m in yaml.safe_load_all(run_helm("template", *flags)) if m]


@pytest.mark.slow
def test_every_object_of_the_walk_is_rendered_when_installed_as_it_says() -> None:
    (install,), (upgrade,) = commands("helm", "install"), commands("helm", "upgrade")
    installed = as_template(install)
    names = {name_of(manifest) for manifest in installed}
    text = " ".join(" ".join(command) for command in commands("kubectl"))
    mentioned = re.findall(r"(deployment|service)/([a-z-]+)", text)
    assert len(mentioned) == 2
    assert {f"{kind.capitalize()}/{name}" for kind, name in mentioned} <= names
    assert "tc-treecast-router.serving.svc:7070" in WALK
    assert {m["metadata"]["namespace"] for m in installed} == {"serving"}
    assert {"ServiceMonitor", "PodMonitor"} <= {m["kind"] for m in as_template(upgrade)}


@pytest.mark.slow
def test_notes_name_what_is_there_when_installed() -> None:
    """Helm prints them after an install only, so the template is rendered by a dry run."""
    (install,) = commands("helm", "install")
    flags = [word for word in install[2:] if word not in ONLY_WITH_A_CLUSTER]
    notes = run_helm("install", *flags, "--dry-run=client")
    names = {name_of(manifest) for manifest in as_template(install)}
    mentioned = re.findall(r"(deployment|service)/([a-z-]+)", notes.partition("NOTES:")[2])
    assert mentioned
    assert {f"{kind.capitalize()}/{name}" for kind, name in mentioned} <= names


@pytest.mark.slow
@pytest.mark.parametrize("command", commands("deploy/images/build.sh"), ids=" ".join)
def test_images_are_those_of_the_chart_when_built_as_it_says(
    command: list[str], tmp_path: Path
) -> None:
    """No container engine may be at hand, so what it would be told is written down instead."""
    (tmp_path / "docker").write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> "$RECORD"\n')
    (tmp_path / "docker").chmod(0o755)
    record = tmp_path / "record"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record)}
    environment["TORCH_INDEX"] = "https://example.com/cpu"
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    built = set()
    for line in record.read_text().splitlines():
        words = shlex.split(line)
        file = ROOT / words[words.index("-f") + 1]
        lines = instructions(file.read_text())
        for flag, word in pairwise(words):
            if flag == "--build-arg":
                assert any(text.startswith(f"ARG {word.partition('=')[0]}=") for text in lines)
            if flag == "--target":
                assert any(text.endswith(f" AS {word}") for text in lines)
            if flag == "-t":
                built.add(word)
    device, *rest = command[1:]
    registry = rest[0] if rest else ""
    sets = [f"--set=image.registry={registry}"]
    if device == "cuda":
        sets += ["--set=verifier.gpus=1,speculatorDefaults.gpus=1"]
    manifests = [m for m in yaml.safe_load_all(run_helm("template", "t", str(CHART), *sets)) if m]
    wanted = {pod.main["image"] for pod in pods(manifests)} - {"valkey/valkey:8.1.1-alpine"}
    assert wanted <= built
    assert len(built) == len(list(IMAGES.glob("*.Dockerfile")))


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(600)
def test_the_first_call_is_answered_when_made_as_it_says(tmp_path: Path) -> None:
    """Against a mesh on this machine: the port is the only difference."""
    (code,) = re.findall(r"```python\n(.*?)```", WALK, re.DOTALL)
    calls = [["-m", "treecast.cli", *command[1:]] for command in commands("treecast")]
    assert len(calls) == 2
    with LocalMesh(MeshSettings(numerics="fast", log_dir=tmp_path)) as mesh:
        said = []
        for words in (*calls, ["-c", code]):
            here = [word.replace("127.0.0.1:7070", mesh.router_address) for word in words]
            done = subprocess.run(
                [sys.executable, *here], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            said.append(done.stdout.strip())
    assert all(said)
    assert "passes of the model" in said[-1]
