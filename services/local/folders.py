"""The default model folders, made in a process of their own.

Unpacking loads torch and the whole model. In ours that memory would stay for as long as the mesh
runs; and a mesh of other folders needs neither.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from treecast.checkpoints import ensure_default_draft, ensure_default_target
from treecast.errors import ModelError, TreecastError

from .process import MeshError, tail

_MAKERS = {"model": ensure_default_target, "draft": ensure_default_draft}


def default_folders(
    kinds: Sequence[str], log_path: Path, report: Callable[[str, str], None]
) -> dict[str, Path]:
    """Put the default "model" or "draft", or both, in place. Blocks; quick once they are there.

    Args:
        report: called with the kind and what is being done for it.
    Raises:
        ModelError: a default is neither installed nor to be fetched.
        MeshError: the process ended otherwise.
    """
    command = [sys.executable, "-m", "treecast.services.local.folders", *kinds]
    folders: dict[str, Path] = {}
    with (
        log_path.open("ab") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            said = json.loads(line)
            if "error" in said:
                raise ModelError(said["error"])
            if "folder" in said:
                folders[said["kind"]] = Path(said["folder"])
            else:
                report(said["kind"], said["doing"])
    if set(folders) != set(kinds):
        why = f"exited with status {process.returncode}"
        raise MeshError(f"unpacking {why}; the end of {log_path}:\n{tail(log_path)}")
    return folders


def main(kinds: Sequence[str]) -> None:
    """The process: lines of JSON on stdout."""
    for kind in kinds:

        def report(text: str, kind: str = kind) -> None:
            print(json.dumps({"kind": kind, "doing": text}), flush=True)  # noqa: T201

        try:
            done = {"kind": kind, "folder": str(_MAKERS[kind](progress=report))}
        except TreecastError as error:
            done = {"error": error.message}
        print(json.dumps(done), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
