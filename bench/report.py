"""What a comparison found, and on what; made to be saved."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from treecast import __version__
from treecast.errors import InvalidRequest
from treecast.sampling.params import SpeculationParams
from treecast.services.local import MeshSettings

from .compare import Summary, summarize
from .machine import describe_machine
from .run import Run


@dataclass(frozen=True, slots=True)
class Report:
    """Settings, machine and versions; a summary per contender; every run."""

    settings: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, Any]
    summaries: tuple[Summary, ...]
    runs: tuple[Run, ...]

    @classmethod
    def of(
        cls,
        mesh: MeshSettings,
        speculation: SpeculationParams,
        max_tokens: int,
        rounds: int,
        contenders: Sequence[str],
        runs: Sequence[Run],
        versions: Mapping[str, Any],
    ) -> Report:
        """Summarize runs made with these settings, now, on this machine."""
        return cls(
            settings={
                **describe_settings(mesh, speculation),
                "max_tokens": max_tokens,
                "rounds": rounds,
            },
            machine=describe_machine(),
            versions={"treecast": __version__, **versions},
            summaries=tuple(summarize(runs, contenders)),
            runs=tuple(runs),
        )

    def fields(self) -> dict[str, Any]:
        """As JSON would have it."""
        return asdict(self)

    def save(self, file: Path) -> None:
        """Replace a file."""
        file.write_text(json.dumps(self.fields(), indent=1) + "\n")


def describe_settings(mesh: MeshSettings, speculation: SpeculationParams) -> dict[str, Any]:
    """What is measured, by a mesh that has started."""
    return {
        "model": Path(mesh.model).name,
        "draft": Path(mesh.draft).name,
        "dtype": mesh.dtype,
        "weights": mesh.weights,
        "numerics": mesh.numerics,
        "device": mesh.device,
        "planner": mesh.planner,
        "threads": mesh.torch_threads,
        "speculators": list(mesh.speculators),
        "law": speculation.law.name.lower(),
        "proposal": speculation.proposal.name.lower(),
        "growth": speculation.growth,
    }


def report_file(out: Path) -> Path:
    """`out`, or a file of the time's name in it if it is a folder, or has no suffix.

    Made ready to be written, with its folders, so that nothing is measured in vain.

    Raises:
        InvalidRequest: it cannot be written.
    """
    is_folder = out.is_dir() or not out.suffix
    file = out / f"{time.strftime('%Y%m%d-%H%M%S')}.json" if is_folder else out
    check_writable(file)
    return file


def check_writable(file: Path) -> None:
    """Make a file's folders and see whether it can be written; what it holds stays.

    Raises:
        InvalidRequest: it cannot.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as stream:
            is_empty = stream.tell() == 0
        if is_empty:
            file.unlink()
    except OSError as error:
        raise InvalidRequest(f"--out {file} cannot be written: {error.strerror}") from error
