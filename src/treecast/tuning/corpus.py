"""The tuning corpus: text that the target wrote by itself, as token ids.

One JSON object a line, `{"prompt_ids": [...], "completion_ids": [...]}`, gzipped where the name
ends in `.gz`. Two more entries may follow: `temperature` of the completion, 0 by default, and
`top`, the target's likeliest tokens for the record's last tokens (`TopTokens`).
"""

import base64
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from treecast.errors import CorpusError

_LINE_START = b'{"prompt_ids": ['


@dataclass(frozen=True, eq=False)
class TopTokens:
    """A model's likeliest tokens; the last row is for a record's last token, and so on back.

    Attributes:
        ids: [num_rows, top_k]
        probs: [num_rows, top_k], of the model's untempered distribution.
        revision: of the model; empty where it is not told.
    """

    ids: NDArray[np.int32]
    probs: NDArray[np.float16]
    revision: str = ""


@dataclass(frozen=True)
class Record:
    """One self-played exchange: the prompt with its chat template, and the target's answer."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    temperature: float = 0.0
    top: TopTokens | None = field(default=None, compare=False)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt_ids + self.completion_ids


@dataclass(frozen=True)
class Corpus:
    """The complete records of a file, and one message for each line that had to be dropped."""

    records: tuple[Record, ...]
    problems: tuple[str, ...] = ()


def read_corpus(path: Path) -> Corpus:
    """Read every complete record; a corpus cut in the middle keeps what came before the cut.

    Raises:
        CorpusError: the file is missing, or holds no complete record.
    """
    if not path.is_file():
        raise CorpusError(f"corpus {path} does not exist")
    records, problems = _read(path)
    if not records:
        detail = f"; {problems[0].message}" if problems else ""
        raise CorpusError(f"corpus {path} holds no complete record{detail}")
    return Corpus(tuple(records), tuple(problem.message for problem in problems))


def read_begun(path: Path) -> tuple[Record, ...]:
    """The complete records of a file to go on with, perhaps none; takes a cut end off the file.

    Raises:
        CorpusError: there is more amiss than a cut end, so it may be another's; it stays as it is.
    """
    if not path.is_file():
        return ()
    records, problems = _read(path)
    if len(problems) > 1 or not all(problem.is_cut_end for problem in problems):
        raise CorpusError(f"{path} is no corpus; name another file ({problems[0].message})")
    if problems:
        write_corpus(path, records)
    return tuple(records)


def write_corpus(path: Path, records: Iterable[Record]) -> None:
    """Replace the file by these records, all or nothing."""
    partial = path.with_name(f".partial-{path.name}")
    partial.unlink(missing_ok=True)
    append_records(partial, records)
    partial.replace(path)


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add records at the end; to a gzip file, as one more member.

    Raises:
        CorpusError: the file cannot be written, as where the disk is full.
    """
    try:
        with _open(path, "ab") as stream:
            for record in records:
                stream.write(json.dumps(_entry(record)).encode() + b"\n")
    except OSError as error:
        raise CorpusError(
            f"cannot write corpus {path}: {error.strerror}; its complete records stay, "
            "and the same command goes on from them"
        ) from error


def check_vocabulary(records: Sequence[Record], vocab_size: int) -> None:
    """Raise CorpusError where a record names a token id that the target does not have."""
    for number, record in enumerate(records, start=1):
        noted = -1 if record.top is None else int(record.top.ids.max(initial=-1))
        if (largest := max(noted, *record.token_ids)) >= vocab_size:
            raise CorpusError(
                f"corpus record {number} has token id {largest}; the vocabulary has {vocab_size}"
            )


class _Problem(NamedTuple):
    """Why a line was dropped, and whether an interrupted writer may have left it so."""

    message: str
    is_cut_end: bool


def _read(path: Path) -> tuple[list[Record], list[_Problem]]:
    records: list[Record] = []
    problems: list[_Problem] = []
    for number, line in _numbered_lines(path, problems):
        try:
            records.append(_parse(line))
        except ValueError as error:
            is_cut_end = not line.endswith(b"\n") and line.startswith(_LINE_START[: len(line)])
            problems.append(_Problem(f"corpus {path}: line {number} dropped: {error}", is_cut_end))
    return records, problems


def _open(path: Path, mode: str) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, mode)  # type: ignore[return-value]  # GzipFile is IO[bytes] at run time
    return path.open(mode)


def _numbered_lines(path: Path, problems: list[_Problem]) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line); a broken gzip stream ends it and adds a problem."""
    number = 0
    with _open(path, "rb") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                yield number, line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            message = f"corpus {path}: line {number + 1} dropped: {error}"
            problems.append(_Problem(message, isinstance(error, EOFError)))


def _entry(record: Record) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "prompt_ids": record.prompt_ids,
        "completion_ids": record.completion_ids,
    }
    if record.temperature:
        entry["temperature"] = record.temperature
    if record.top is not None:
        ids, probs = record.top.ids.astype("<i4"), record.top.probs.astype("<f2")
        entry["top"] = {
            "top_k": ids.shape[1],
            "revision": record.top.revision,
            "ids": base64.b64encode(ids.tobytes()).decode(),
            "probs": base64.b64encode(probs.tobytes()).decode(),
        }
    return entry


def _parse(line: bytes) -> Record:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not a complete JSON object ({len(line)} bytes)") from error
    if not isinstance(entry, dict):
        raise ValueError(f"not a JSON object but {type(entry).__name__}")
    prompt_ids = _token_ids(entry, "prompt_ids")
    completion_ids = _token_ids(entry, "completion_ids")
    temperature = entry.get("temperature", 0.0)
    if type(temperature) not in (int, float) or not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature!r}; it must be a number of 0 or more")
    top = _top_tokens(entry["top"], len(prompt_ids + completion_ids)) if "top" in entry else None
    return Record(prompt_ids, completion_ids, float(temperature), top)


def _top_tokens(entry: Any, num_tokens: int) -> TopTokens:
    try:
        shape = (-1, int(entry["top_k"]))
        ids = np.frombuffer(base64.b64decode(entry["ids"]), "<i4").reshape(shape)
        probs = np.frombuffer(base64.b64decode(entry["probs"]), "<f2").reshape(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"top is not what tuning writes: {error!r}") from error
    if len(ids) != len(probs) or len(ids) >= num_tokens or (ids.size and ids.min() < 0):
        raise ValueError(f"top has {len(ids)} and {len(probs)} rows for {num_tokens} tokens")
    return TopTokens(ids, probs, str(entry.get("revision", "")))


def _token_ids(entry: dict[str, object], key: str) -> tuple[int, ...]:
    ids = entry.get(key)
    if not isinstance(ids, list) or not ids:
        raise ValueError(f"{key} is not a list of token ids")
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(f"{key} holds something other than token ids")
    return tuple(ids)
