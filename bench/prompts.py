"""Prompt files: one JSON object a line, as Spec-Bench writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from treecast.errors import CorpusError

DEFAULT_PROMPTS = Path(__file__).parent / "prompts.jsonl"


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """The first turn of an entry."""

    id: str
    category: str
    text: str


def read_prompts(path: Path, limit: int | None = None) -> list[BenchPrompt]:
    """Read {"id", "category", "turns"} lines; with a limit, evenly spread over the file.

    Raises:
        CorpusError: the file cannot be read, or a line is not such an object.
    """
    try:
        prompts = list(_parse(path))
    except OSError as error:
        raise CorpusError(f"prompts {path} cannot be read: {error.strerror}") from error
    if not prompts:
        raise CorpusError(f"prompts {path} holds no prompt")
    if limit is None or limit >= len(prompts):
        return prompts
    return [prompts[place * len(prompts) // limit] for place in range(limit)]


def _parse(path: Path) -> Iterator[BenchPrompt]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                yield BenchPrompt(str(entry["id"]), str(entry["category"]), str(entry["turns"][0]))
            except (ValueError, LookupError, TypeError) as error:
                raise CorpusError(
                    f"prompts {path}: line {number} is no object with id, category and turns"
                ) from error
