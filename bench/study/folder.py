"""A report's folder: one JSON file per section, written whole when the section is done."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from treecast import __version__
from treecast.bench.machine import describe_machine
from treecast.errors import InvalidRequest

from .bed import StudySettings
from .results import Guesses, Measurements, Reliability, StepTime, Trial
from .sections import Section

_LIBRARIES = ("torch", "transformers", "numpy")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a section's figures come from.

    Attributes:
        settings: of `StudySettings`, as JSON has them.
        command: that measured them.
        seconds: that it took, without loading models and recording answers.
    """

    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str
    seconds: float

    @classmethod
    def now(cls, settings: StudySettings, command: str, seconds: float) -> Origin:
        """Measured here, by what is installed."""
        versions = {"treecast": __version__} | {name: _installed(name) for name in _LIBRARIES}
        return cls(settings.fields(), describe_machine(), versions, command, round(seconds, 1))


@dataclass(frozen=True, slots=True)
class Finding:
    """A section that was measured."""

    section: Section
    origin: Origin
    measured: Measurements


class Folder:
    """Findings on disk. A section that was interrupted leaves no file."""

    def __init__(self, path: Path) -> None:
        """Make the folder where there is none.

        Raises:
            InvalidRequest: it cannot be made.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequest(f"folder {path} cannot be made: {error.strerror}") from error

    def read(self) -> list[Finding]:
        """Findings in the order of the report.

        Raises:
            InvalidRequest: a file of a section's name holds something else.
        """
        return [
            _parse(section, self._file(section))
            for section in Section
            if self._file(section).is_file()
        ]

    def check(self, settings: StudySettings) -> None:
        """Figures of other settings may not stand in one report.

        Raises:
            InvalidRequest: names the first setting that differs.
        """
        for found in self.read():
            for name, value in settings.fields().items():
                before = found.origin.settings.get(name)
                if before != value:
                    raise InvalidRequest(
                        f"{self._file(found.section)} was measured with {name} {before!r}, and now "
                        f"it is {value!r}; name another folder, or remove this one's files"
                    )

    def save(self, finding: Finding) -> None:
        """Write a section's file, whole or not at all."""
        document = {"origin": asdict(finding.origin), "measured": asdict(finding.measured)}
        self.write(self._file(finding.section).name, json.dumps(document, indent=1) + "\n")

    def write(self, name: str, text: str) -> Path:
        """Replace a text file.

        Raises:
            InvalidRequest: the folder cannot be written to.
        """
        file, partial = self.path / name, self.path / f".partial-{name}"
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise InvalidRequest(f"{file} cannot be written: {error.strerror}") from error
        return file

    def _file(self, section: Section) -> Path:
        return self.path / f"{section.value}.json"


def _parse(section: Section, file: Path) -> Finding:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        measured = {kind: _rows(kind, rows) for kind, rows in document["measured"].items()}
        return Finding(section, Origin(**document["origin"]), Measurements(**measured))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InvalidRequest(f"{file} is no section of a report; remove it ({error})") from error


_KINDS: dict[str, type[Guesses | Trial | StepTime | Reliability]] = {
    "guesses": Guesses,
    "trials": Trial,
    "times": StepTime,
    "reliability": Reliability,
}


def _rows(kind: str, rows: list[dict[str, Any]]) -> Any:
    make = _KINDS[kind]
    return tuple(make(**{name: _frozen(value) for name, value in row.items()}) for row in rows)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
