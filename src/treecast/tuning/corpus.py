"""The tuning corpus: text that the target wrote by itself, as token ids.

One JSON object a line, `{"prompt_ids": [...], "completion_ids": [...]}`, gzipped where the name
ends in `.gz`.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from treecast.errors import CorpusError


@dataclass(frozen=True)
class Record:
    """One self-played exchange: the prompt with its chat template, and the target's answer."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.completion_ids


@dataclass(frozen=True)
class Corpus:
    """The complete records of a file, and one message for each line that had to be dropped."""

    records: tuple[Record, ...]
    problems: tuple[str, ...] = ()

    @property
    def num_dropped(self) -> int:
        return len(self.problems)


def read_corpus(path: Path) -> Corpus:
    """Read every complete record; a corpus cut in the middle keeps what came before the cut.

    Raises:
        CorpusError: the file is missing, or holds no complete record.
    """
    if not path.is_file():
        raise CorpusError(f"corpus {path} does not exist")
    records: list[Record] = []
    problems: list[str] = []
    for number, line in _numbered_lines(path, problems):
        try:
            records.append(_parse(line))
        except ValueError as error:
            problems.append(f"corpus {path}: line {number} dropped: {error}")
    if not records:
        detail = f"; {problems[0]}" if problems else ""
        raise CorpusError(f"corpus {path} holds no complete record{detail}")
    return Corpus(tuple(records), tuple(problems))


def write_corpus(path: Path, records: Iterable[Record]) -> None:
    """Replace the file by these records, all or nothing."""
    partial = path.with_name(f".partial-{path.name}")
    partial.unlink(missing_ok=True)
    append_records(partial, records)
    partial.replace(path)


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add records at the end; to a gzip file, as one more member."""
    with _open(path, "ab") as stream:
        for record in records:
            entry = {"prompt_ids": record.prompt_ids, "completion_ids": record.completion_ids}
            stream.write(json.dumps(entry).encode() + b"\n")


def check_vocabulary(records: Sequence[Record], vocab_size: int) -> None:
    """Raise CorpusError where a record names a token id that the target does not have."""
    for number, record in enumerate(records, start=1):
        if (largest := max(record.token_ids)) >= vocab_size:
            raise CorpusError(
                f"corpus record {number} has token id {largest}; the vocabulary has {vocab_size}"
            )


def _open(path: Path, mode: str) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, mode)  # type: ignore[return-value]  # GzipFile is IO[bytes] at run time
    return path.open(mode)


def _numbered_lines(path: Path, problems: list[str]) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line); a broken gzip stream ends it and adds a problem."""
    number = 0
    with _open(path, "rb") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            problems.append(f"corpus {path}: line {number + 1} dropped: {error}")


def _parse(line: bytes) -> Record:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not a complete JSON object ({len(line)} bytes)") from error
    if not isinstance(entry, dict):
        raise ValueError(f"not a JSON object but {type(entry).__name__}")
    return Record(_token_ids(entry, "prompt_ids"), _token_ids(entry, "completion_ids"))


def _token_ids(entry: dict[str, object], key: str) -> tuple[int, ...]:
    ids = entry.get(key)
    if not isinstance(ids, list) or not ids:
        raise ValueError(f"{key} is not a list of token ids")
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(f"{key} holds something other than token ids")
    return tuple(ids)
