"""A model small enough to compute by hand, behind the engine's whole contract.

After text t_0 .. t_n the favoured next token is `(3 * t_n + t_(n-1) + 1) mod V` (a token that is
not there counts as 0), and the token r places above it, modulo V, has logit `-slope * r`, where
`slope = (4 + S mod 8) / 8` and `S = sum((i + 1) * t_i)`. So greedy output needs the last two
tokens, and the bits of a row need every token in its place. An adapter is a number by which the
favoured token is moved on.

Rows are computed from token ids that lie in the pool where a real model's keys and values would,
and by the same accounts: a wrong commit gives wrong logits. Rows that break the contract fail an
assertion.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from treecast.adapter import Adapter
from treecast.engine.base import KVSequence, LogitRows, ModelInfo, Segment
from treecast.engine.kv_pool import KVPool, PagedSequence
from treecast.engine.pooled import PooledEngine, paged
from treecast.prefix import PAGE_TOKENS
from treecast.settings import POOL_TOKENS

_EMPTY = -1


@dataclass(frozen=True, slots=True)
class ToyState:
    """All that the toy model remembers of a text: length, last two tokens, weighted sum."""

    length: int = 0
    last: int = 0
    before_last: int = 0
    weighted_sum: int = 0

    def after(self, token: int) -> ToyState:
        weighted_sum = self.weighted_sum + (self.length + 1) * token
        return ToyState(self.length + 1, token, self.last, weighted_sum)

    def favoured(self, vocab_size: int, shift: int = 0) -> int:
        return (3 * self.last + self.before_last + 1 + shift) % vocab_size

    def logits(self, vocab_size: int, shift: int = 0) -> NDArray[np.float32]:
        """[vocab] float32, exact; `shift` is the adapter's."""
        rank = (np.arange(vocab_size) - self.favoured(vocab_size, shift)) % vocab_size
        slope = np.float32((4 + self.weighted_sum % 8) / 8)
        return -slope * rank.astype(np.float32)


def toy_state(tokens: Iterable[int]) -> ToyState:
    """The state after a text."""
    return reduce(ToyState.after, tokens, ToyState())


def toy_logits(tokens: Iterable[int], vocab_size: int, shift: int = 0) -> NDArray[np.float32]:
    """[vocab] float32: the row that follows a text, from the text alone; the engine's oracle."""
    return toy_state(tokens).logits(vocab_size, shift)


class TokenStorage:
    """What lies in the toy's pool: one token id per place, and the shift of its adapter.

    Attributes:
        saved: what was swapped out, by key.
    """

    def __init__(self, places: int) -> None:
        self.tokens = np.full(places, _EMPTY, np.int64)
        self.shifts = np.zeros(places, np.int64)
        self.saved: dict[int, NDArray[np.int64]] = {}

    @property
    def position_bytes(self) -> int:
        return self.tokens.itemsize + self.shifts.itemsize

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self.tokens[list(targets)] = self.tokens[list(sources)]
        self.shifts[list(targets)] = self.shifts[list(sources)]

    def save(self, key: int, places: Sequence[int]) -> None:
        self.saved[key] = np.stack([self.tokens[list(places)], self.shifts[list(places)]])

    def load(self, key: int, places: Sequence[int]) -> None:
        self.tokens[list(places)], self.shifts[list(places)] = self.saved.pop(key)

    def forget(self, key: int) -> None:
        del self.saved[key]


@dataclass(frozen=True, slots=True)
class ToyRows:
    """A segment's wanted rows, each made when asked for."""

    states: Sequence[ToyState]
    vocab_size: int
    shift: int = 0

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, row: int, /) -> NDArray[np.float32]:
        return self.states[row].logits(self.vocab_size, self.shift)


class ToyEngine(PooledEngine):
    """The toy model and its pool. `num_passes` and `num_rows` count what it has computed.

    `storage` is what the pool holds, and what was swapped out of it.
    """

    def __init__(
        self,
        vocab_size: int = 97,
        context_tokens: int = 1024,
        pool_tokens: int = POOL_TOKENS,
        step_s: float = 0,
        eos_token_ids: Iterable[int] = (),
        on_forward: Callable[[Sequence[Segment]], None] | None = None,
        adapters: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Make an engine with an empty pool.

        Args:
            vocab_size: token ids are below this.
            context_tokens: positions are below this.
            pool_tokens: pool size; rounded up to whole pages.
            step_s: how long a pass takes, spent asleep.
            eos_token_ids: what the model's end-of-sequence tokens are said to be.
            on_forward: called at the start of every pass; may block to hold it, or raise.
            adapters: shifts by name.
        """
        info = ModelInfo(
            name="toy",
            revision=f"toy-{vocab_size}",
            vocab_size=vocab_size,
            context_tokens=context_tokens,
            eos_token_ids=frozenset(eos_token_ids),
            tokenizer_hash="",
            fingerprint=f"toy-{vocab_size}",
            adapters=tuple(Adapter(name, f"shift-{by}") for name, by in adapters.items()),
        )
        num_pages = -(-pool_tokens // PAGE_TOKENS)
        self.storage = TokenStorage(num_pages * PAGE_TOKENS)
        super().__init__(info, KVPool(num_pages, self.storage))
        self._step_s = step_s
        self._shifts = {"": 0, **adapters}
        self._on_forward = on_forward
        self.moved_bytes = 0
        self.num_passes = 0
        self.num_rows = 0

    def forward(self, segments: Sequence[Segment]) -> list[LogitRows]:
        if self._on_forward is not None:
            self._on_forward(segments)
        self._check(segments)
        time.sleep(self._step_s)
        self.num_passes += 1
        return [self._compute(segment) for segment in segments]

    def commit(self, sequence: KVSequence, path: Sequence[int], keep: Sequence[int] = ()) -> None:
        own = paged(sequence)
        assert all(row < own.num_rows for row in (*path, *keep)), f"{path=} {keep=} {own.num_rows=}"
        super().commit(own, path, keep)

    def check(self) -> None:
        """There is nobody to lose."""

    def close(self) -> None:
        """There is nobody to tell."""

    def _check(self, segments: Sequence[Segment]) -> None:
        assert segments, "a pass without segments"
        owners = [id(segment.sequence) for segment in segments]
        assert len(set(owners)) == len(owners), "two segments of one sequence in a pass"
        for segment in segments:
            self._check_rows(segment)
            self._check_room(segment)

    def _check_rows(self, segment: Segment) -> None:
        first, count = segment.sequence.num_rows, len(segment.tokens)
        assert 0 < count == len(segment.parents), f"{count} tokens, {len(segment.parents)} parents"
        assert all(0 <= token < self.info.vocab_size for token in segment.tokens), segment.tokens
        for row, parent in enumerate(segment.parents):
            assert -1 <= parent < first + row, f"row {first + row} has parent {parent}"
        wanted = list(segment.wanted)
        assert wanted == sorted(set(wanted)), f"wanted rows do not ascend: {wanted}"
        assert not wanted or 0 <= wanted[0] <= wanted[-1] < count, f"{wanted=} of {count}"

    def _check_room(self, segment: Segment) -> None:
        sequence = paged(segment.sequence)
        depths = list(sequence.depths)
        for parent in segment.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        assert sequence.length + max(depths) < self.info.context_tokens, "beyond the context"

    def _compute(self, segment: Segment) -> LogitRows:
        sequence = paged(segment.sequence)
        first = sequence.num_rows
        self._pool.append(sequence, segment.parents)
        start = sequence.length + first
        places = sequence.places(start, start + len(segment.tokens))
        self.storage.tokens[places] = segment.tokens
        shift = self._shifts[sequence.adapter]
        self.storage.shifts[places] = shift
        self.num_rows += len(segment.tokens)
        states = self._row_states(sequence)
        wanted = [states[first + row] for row in segment.wanted]
        return ToyRows(wanted, self.info.vocab_size, shift)

    def _row_states(self, sequence: PagedSequence) -> list[ToyState]:
        """The state after each uncommitted row, from what lies in the sequence's places."""
        places = sequence.places(0, sequence.num_slots)
        tokens = self.storage.tokens[places].tolist()
        assert _EMPTY not in tokens, "a place of the sequence was never written"
        computed_with = set(self.storage.shifts[places].tolist())
        assert computed_with <= {self._shifts[sequence.adapter]}, f"{computed_with=}"
        committed = toy_state(tokens[: sequence.length])
        states: list[ToyState] = []
        for token, parent in zip(tokens[sequence.length :], sequence.parents, strict=True):
            states.append((committed if parent < 0 else states[parent]).after(token))
        return states
