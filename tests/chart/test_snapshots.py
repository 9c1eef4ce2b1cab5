"""What each example makes, in a few lines: changes of the chart show as changes of these files.

`TREECAST_WRITE_SNAPSHOTS=1 make chart` writes them anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import rendered
from .helm import EXAMPLES, Manifest
from .manifests import Pod, name_of, pods

SNAPSHOTS = Path(__file__).parent / "snapshots"


def summary(manifests: list[Manifest]) -> str:
    """Names of all objects; of pods, what they run and how they end."""
    lines: list[str] = []
    for manifest in sorted(manifests, key=name_of):
        replicas = manifest.get("spec", {}).get("replicas")
        lines.append(name_of(manifest) + (f" x {replicas}" if replicas is not None else ""))
        for pod in pods([manifest]):
            lines += [f"  {line}" for line in describe(pod)]
    return "\n".join(lines) + "\n"


def describe(pod: Pod) -> Iterator[str]:
    yield f"{pod.component}, {pod.spec.get('terminationGracePeriodSeconds', 30)} s to end"
    for container in pod.containers:
        limits = ", ".join(
            f"{kind} {n}" for kind, n in sorted(container["resources"]["limits"].items())
        )
        yield f"{container['name']}: {container['image']} ({limits})"
        yield from (
            f"  {arg}" for arg in (*container.get("command", ()), *container.get("args", ()))
        )


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_summary_is_the_one_on_file_when_rendered(example: Path) -> None:
    now = summary(list(rendered(example.stem)))
    file = SNAPSHOTS / f"{example.stem}.txt"
    if os.environ.get("TREECAST_WRITE_SNAPSHOTS"):
        file.write_text(now)
    assert now == file.read_text()
