"""The contract between whoever decides (verifier, drafter) and whoever computes (an engine)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treecast.adapter import Adapter, names_of
from treecast.errors import NotServed
from treecast.tree import ROOT, TokenTree


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What an engine serves.

    Attributes:
        fingerprint: equal for engines whose bits are equal for equal rows (model revision, dtype,
            numerics mode, instruction set, library versions, parallelism, KV type).
        tokenizer_hash: empty for a model without a tokenizer.
        adapters: that sequences may be computed with; their weights are no part of the fingerprint.
    """

    name: str
    revision: str
    vocab_size: int
    context_tokens: int
    eos_token_ids: frozenset[int]
    tokenizer_hash: str
    fingerprint: str
    adapters: tuple[Adapter, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """Pages of the KV pool; free + used == total after anything.

    Attributes:
        position_bytes: host memory that one position takes once it is swapped out.
    """

    total: int
    free: int
    used: int
    page_tokens: int
    position_bytes: int


class KVSequence(Protocol):
    """One sequence's place in the KV pool: committed positions, then uncommitted tree rows."""

    @property
    def length(self) -> int:
        """Committed positions."""

    @property
    def num_rows(self) -> int:
        """Uncommitted tree rows behind them."""

    @property
    def capacity(self) -> int:
        """Positions and rows that the reserved pages hold."""

    @property
    def own_pages(self) -> int:
        """Pages that no other sequence holds: those that come free with it."""

    @property
    def shared_pages(self) -> int:
        """Pages of committed positions that others hold too and that need not be copied."""


class SwappedKV(Protocol):
    """A sequence's committed positions, out of the pool."""

    @property
    def length(self) -> int:
        """Positions."""

    @property
    def nbytes(self) -> int:
        """Host memory that they take, in all processes of a group."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows of one sequence in a packed pass, appended behind its uncommitted rows.

    Attributes:
        tokens: [n] token ids.
        parents: [n] index among the sequence's uncommitted rows (those already there count first),
            or -1 for a row that follows the committed positions. A row's position is
            length + its depth. A prefill chunk is a chain.
        wanted: positions in `tokens` (0..n-1) of the rows whose logits are needed, ascending.
    """

    sequence: KVSequence
    tokens: Sequence[int]
    parents: Sequence[int]
    wanted: Sequence[int]

    @classmethod
    def chain(cls, sequence: KVSequence, tokens: Sequence[int], wanted: Sequence[int]) -> Segment:
        """A prefill chunk, or a lone decoding row: each token follows the one before."""
        first = sequence.num_rows - 1
        return cls(sequence, tokens, range(first, first + len(tokens)), wanted)

    @classmethod
    def rooted(cls, sequence: KVSequence, pending: Sequence[int], tree: TokenTree) -> Segment:
        """Committed tokens whose KV is missing, as a chain, and a tree below the last of them.

        That one's logits are wanted, and those of the tree.
        """
        root = len(pending) - 1
        below = (root if parent == ROOT else parent + root + 1 for parent in tree.parents)
        tokens = [*pending, *tree.tokens]
        return cls(sequence, tokens, [*range(-1, root), *below], range(root, len(tokens)))


class LogitRows(Protocol):
    """Logits of one segment's wanted rows, in their order; rows are made when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> NDArray[np.float32]:
        """[vocab] float32; not to be written to."""


class Engine(Protocol):
    """A model and its KV pool. Not thread-safe: one owner calls it, one call at a time."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def usage(self) -> PoolUsage: ...

    @property
    def moved_bytes(self) -> int:
        """Bytes of weights brought to the device for passes so far; 0 where all of them stay."""

    def allocate(self, capacity: int, adapter: str = "") -> KVSequence:
        """Reserve pages for `capacity` positions and rows, all computed with one adapter or none.

        Raises:
            NotServed: no such adapter.
            Overloaded: not enough free pages.
        """

    def reserve(self, sequence: KVSequence, capacity: int) -> None:
        """Grow a sequence's reservation to at least `capacity` (in place, moved or scattered).

        Raises:
            Overloaded: not enough free pages; the sequence is unchanged.
        """

    def fork(self, sequence: KVSequence, length: int, capacity: int) -> KVSequence:
        """A new sequence with the first `length` committed positions, sharing their full pages.

        It is computed with the same adapter.

        Raises:
            Overloaded: not enough free pages.
        """

    def truncate(self, sequence: KVSequence, length: int) -> None:
        """Drop all tree rows and the committed positions from `length` on; reservation stays."""

    def trim(self, sequence: KVSequence) -> None:
        """Give back the pages that hold no committed position."""

    def free(self, sequence: KVSequence) -> None:
        """Give back all pages; the sequence must not be used again."""

    def swap_out(self, sequence: KVSequence) -> SwappedKV:
        """Move a sequence's committed positions to host memory and give back all its pages.

        The sequence must not be used again. Contents are read by the next `forward`, before it
        writes, so that this call is only accounts.
        """

    def swap_in(self, swapped: SwappedKV, capacity: int) -> KVSequence:
        """A sequence with those positions and pages for `capacity`; `swapped` is used up.

        Raises:
            Overloaded: not enough free pages; nothing has changed.
        """

    def discard(self, swapped: SwappedKV) -> None:
        """Free what was swapped out; it must not be used again."""

    def forward(self, segments: Sequence[Segment]) -> list[LogitRows]:
        """Append the segments' rows and compute them in one packed pass. Blocks; one item each."""

    def commit(self, sequence: KVSequence, path: Sequence[int], keep: Sequence[int] = ()) -> None:
        """Make tree rows permanent and drop the rest, compacting the pool.

        Args:
            path: indices of uncommitted rows, a chain from a root row down; they become positions
                length .. length + len(path) - 1.
            keep: rows (ascending, with all their parents up to the path's last) that stay as
                uncommitted rows, renumbered 0.. in this order.
        """

    def check(self) -> None:
        """See that whoever computes is there. Blocks briefly; called now and then while idle.

        Raises:
            EngineLost: a process of the group is gone or hangs; the engine is of no use any more.
        """

    def close(self) -> None:
        """Let other processes of a group go; the engine must not be used again."""


def check_adapter(info: ModelInfo, adapter: str) -> None:
    """Raise NotServed, with those that are, for an adapter that an engine does not have."""
    if adapter and adapter not in {one.name for one in info.adapters}:
        raise NotServed(
            f"adapter {adapter!r} is not served with model {info.name!r}; "
            f"served: {names_of(info.adapters)}"
        )
