"""The check of the protos against the last release goes red when it should."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTOS = Path(__file__).parents[2] / "protos"


@pytest.fixture
def protos(tmp_path: Path) -> Path:
    """A copy that is its own last release, so that the test does not depend on the real one."""
    copy = tmp_path / "protos"
    shutil.copytree(PROTOS, copy)
    assert run(copy, "release").returncode == 0
    return copy


def run(protos: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, protos / "compatibility.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def edit(protos: Path, file: str, old: str, new: str) -> None:
    path = protos / "treecast" / "v1" / file
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_check_is_green_when_nothing_changed(protos: Path) -> None:
    done = run(protos)
    assert (done.returncode, done.stdout) == (0, "")


def test_check_is_green_when_a_field_is_added(protos: Path) -> None:
    edit(protos, "tree.proto", "bytes proposers = 4;", "bytes proposers = 4;\n  bytes more = 9;")
    assert run(protos).returncode == 0


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("bytes proposers = 4;", "bytes proposers = 9;", 'Previously present field "4" with name'),
        ("bytes proposers = 4;", "uint64 proposers = 4;", 'changed type from "bytes" to "uint64"'),
        ("repeated uint32 parents = 2;", "", 'Previously present field "2" with name "parents"'),
        ("bytes proposers = 4;", "bytes Proposers = 4;", "should be lower_snake_case"),
    ],
)
def test_check_names_the_field_when_the_wire_or_the_style_breaks(
    protos: Path, old: str, new: str, complaint: str
) -> None:
    edit(protos, "tree.proto", old, new)
    done = run(protos)
    assert done.returncode != 0
    assert complaint in done.stdout
