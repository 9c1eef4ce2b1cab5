"""The walk in docs/first-token.md: its commands exist, and lead to a first token."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from treecast.cli.app import app

ROOT = Path(__file__).parents[2]
WALK = (ROOT / "docs" / "first-token.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", WALK, re.DOTALL)


def commands() -> list[list[str]]:
    """All lines that run treecast, as words."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("treecast ")]


def test_every_command_of_the_walk_is_understood():
    program = typer.main.get_command(app)
    assert [words[1] for words in commands()] == ["up", "generate", "status", "trace"]
    for _, name, *arguments in commands():
        program.commands[name].make_context(name, arguments)  # parses, runs nothing
    for block in blocks("python"):
        compile(block, "first-token.md", "exec")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment where `treecast` and `python` are those under test, on a port of their own."""
    shim = tmp_path / "bin" / "treecast"
    shim.parent.mkdir()
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m treecast.cli "$@"\n')
    shim.chmod(0o755)
    router = f"127.0.0.1:{free_port()}"
    path = f"{shim.parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "TREECAST_ROUTER": router}


@pytest.fixture
def mesh(shell: dict[str, str], tmp_path: Path) -> Iterator[None]:
    """`treecast up`, once it has said that it is ready."""
    command = ["treecast", "up", "--listen", shell["TREECAST_ROUTER"]]
    up = subprocess.Popen(
        command, cwd=tmp_path, env=shell, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert up.stderr is not None
    try:
        for line in up.stderr:
            if b"router ready" in line:
                break
        else:
            pytest.fail("treecast up ended before the router was ready")
        yield
    finally:
        up.send_signal(signal.SIGINT)
        assert up.wait(60) == 130


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("mesh")
def test_the_walk_leads_to_tokens_and_a_page_when_followed(shell: dict[str, str], tmp_path: Path):
    for words in commands()[1:]:
        done = subprocess.run(words, cwd=tmp_path, env=shell, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
    assert "article" in (tmp_path / "trace.html").read_text()
    [program] = blocks("python")
    program = program.replace("127.0.0.1:7070", shell["TREECAST_ROUTER"])
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert re.search(r"\d+ tokens in \d+ passes of the model", said.stdout)


@pytest.mark.slow
def test_the_wheel_is_whole_when_it_is_built_from_the_sdist(tmp_path: Path):
    """`services`, `bench` and the like are links in our tree; neither archive keeps links."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]
    done = subprocess.run([*build, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "bench", "services", "deploy/dashboards", "src", "models"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    moved = {"deploy/dashboards": "dashboards", "models": "shipped", "src/treecast/": ""}
    links = {"bench", "services", "dashboards", "shipped"}
    wanted = set()
    for name in tracked:
        for folder, inside in moved.items():
            name = name.replace(folder, inside, 1) if name.startswith(folder) else name
        if name not in links:
            wanted.add(f"treecast/{name}")
    assert not wanted - names
