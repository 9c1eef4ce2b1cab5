"""What rank 0 tells the others, as whole numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treecast.engine.executor import PackedPass, PackedSegment

Words = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy places of the pool; all are read before any is written."""

    sources: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Save:
    """Keep what is in these places of the pool under a key."""

    key: int
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """Write what was saved under a key into these places."""

    key: int
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop what was saved under a key."""

    key: int


Move = Copy | Save | Load | Forget


@dataclass(frozen=True, slots=True)
class Compute:
    """Make these moves, one after the other, then compute the pass."""

    moves: tuple[Move, ...]
    packed: PackedPass


@dataclass(frozen=True, slots=True)
class Meet:
    """Show that you are there."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The group ends as it should."""


Order = Compute | Meet | Stop

_COMPUTE, _MEET, _STOP = 1, 2, 3
_COPY, _SAVE, _LOAD, _FORGET = 1, 2, 3, 4


def encode(order: Order) -> Words:
    """[words] int64."""
    match order:
        case Meet():
            return np.array([_MEET])
        case Stop():
            return np.array([_STOP])
        case Compute(moves, packed):
            words = [_COMPUTE, len(moves)]
            for move in moves:
                words += _encode_move(move)
            words += [len(packed.tokens), *packed.tokens, *packed.positions]
            words += [len(packed.wanted), *packed.wanted, len(packed.segments)]
            for segment in packed.segments:
                words += [segment.num_rows, segment.length]
                words += [len(segment.parents), *segment.parents]
                words += [len(segment.pages), *segment.pages]
            return np.array(words)


def decode(words: Words) -> Order:
    """The order; the words come from our own rank 0, and their checksum was right."""
    reader = _Reader(words.tolist())
    match reader.one():
        case int(kind) if kind == _MEET:
            return Meet()
        case int(kind) if kind == _STOP:
            return Stop()
    moves = tuple(_read_move(reader) for _ in range(reader.one()))
    count = reader.one()
    tokens, positions = reader.some(count), reader.some(count)
    wanted = reader.some(reader.one())
    segments = tuple(_read_segment(reader) for _ in range(reader.one()))
    return Compute(moves, PackedPass(tokens, positions, wanted, segments))


def _encode_move(move: Move) -> list[int]:
    match move:
        case Copy(sources, targets):
            return [_COPY, len(sources), *sources, *targets]
        case Save(key, places):
            return [_SAVE, key, len(places), *places]
        case Load(key, places):
            return [_LOAD, key, len(places), *places]
        case Forget(key):
            return [_FORGET, key]


def _read_move(reader: _Reader) -> Move:
    match reader.one():
        case int(kind) if kind == _COPY:
            count = reader.one()
            return Copy(reader.some(count), reader.some(count))
        case int(kind) if kind == _SAVE:
            return Save(reader.one(), reader.some(reader.one()))
        case int(kind) if kind == _LOAD:
            return Load(reader.one(), reader.some(reader.one()))
    return Forget(reader.one())


def _read_segment(reader: _Reader) -> PackedSegment:
    num_rows, length = reader.some(2)
    return PackedSegment(num_rows, length, reader.some(reader.one()), reader.some(reader.one()))


class _Reader:
    def __init__(self, words: Sequence[int]) -> None:
        self._words: Iterator[int] = iter(words)

    def one(self) -> int:
        return next(self._words)

    def some(self, count: int) -> tuple[int, ...]:
        return tuple(next(self._words) for _ in range(count))
