"""What engines over a `KVPool` have in common: all of the contract but the passes."""

from __future__ import annotations

from collections.abc import Sequence

from treecast.engine.base import KVSequence, ModelInfo, PoolUsage, SwappedKV, check_adapter
from treecast.engine.kv_pool import KVPool, PagedSequence, SwappedSequence
from treecast.errors import ModelError


class PooledEngine:
    """A model's facts and the accounts of its pool; see `engine.base.Engine` for each call.

    Whoever computes adds `forward`, `moved_bytes`, `check` and `close`.
    """

    def __init__(self, info: ModelInfo, pool: KVPool) -> None:
        self._info = info
        self._pool = pool

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def usage(self) -> PoolUsage:
        return self._pool.usage

    def allocate(self, capacity: int, adapter: str = "") -> PagedSequence:
        check_adapter(self._info, adapter)
        return self._pool.allocate(capacity, adapter)

    def reserve(self, sequence: KVSequence, capacity: int) -> None:
        self._pool.reserve(paged(sequence), capacity)

    def fork(self, sequence: KVSequence, length: int, capacity: int) -> PagedSequence:
        return self._pool.fork(paged(sequence), length, capacity)

    def truncate(self, sequence: KVSequence, length: int) -> None:
        self._pool.truncate(paged(sequence), length)

    def trim(self, sequence: KVSequence) -> None:
        self._pool.trim(paged(sequence))

    def free(self, sequence: KVSequence) -> None:
        self._pool.free(paged(sequence))

    def swap_out(self, sequence: KVSequence) -> SwappedSequence:
        return self._pool.swap_out(paged(sequence))

    def swap_in(self, swapped: SwappedKV, capacity: int) -> PagedSequence:
        return self._pool.swap_in(_swapped(swapped), capacity)

    def discard(self, swapped: SwappedKV) -> None:
        self._pool.discard(_swapped(swapped))

    def commit(self, sequence: KVSequence, path: Sequence[int], keep: Sequence[int] = ()) -> None:
        self._pool.commit(paged(sequence), path, keep)


def paged(sequence: KVSequence) -> PagedSequence:
    """A sequence as the pool knows it.

    Raises:
        ModelError: it is another kind of engine's.
    """
    if not isinstance(sequence, PagedSequence):
        raise ModelError(f"a {type(sequence).__name__} is no sequence of this engine")
    return sequence


def _swapped(swapped: SwappedKV) -> SwappedSequence:
    if not isinstance(swapped, SwappedSequence):
        raise ModelError(f"a {type(swapped).__name__} was not swapped out by this engine")
    return swapped
