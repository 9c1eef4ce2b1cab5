"""How large a page of the KV pool should be: what is wasted, shared and paid in accounts.

    python -m treecast.bench.pages

plays the same requests over the pool's own accounts with pages of several sizes: prompts that begin
alike, trees and commits, ends in random order. Kernels read by place, so on a CPU a page's size
costs nothing but this; on a GPU a page is the block of keys that a program takes at a time, and
exact numerics add up by blocks of 64, so that those sizes need no second table.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from treecast.engine import kv_pool
from treecast.engine.kv_pool import KVPool, PagedSequence

SIZES = (16, 32, 64, 128, 256)
_POOL_TOKENS = 1 << 17
_RUNNING = 32
_STEPS = 2000
_COMMON = 200
"""Tokens that all prompts begin with: a system prompt."""
_NODES = 16


@dataclass(slots=True)
class Tally:
    """What one size came to.

    Attributes:
        wasted: share of the pages' positions in use that hold nothing.
        shared: share of the common beginning that lies in the pool once for all.
        step_us: accounts of one request's step.
        moved: positions copied, a step.
    """

    page_tokens: int
    wasted: float = 0.0
    shared: float = 0.0
    step_us: float = 0.0
    moved: float = 0.0


class _Counted:
    """A pool's contents that count what is copied."""

    def __init__(self) -> None:
        self.moved = 0

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self.moved += len(sources)


def measure(page_tokens: int, seed: int = 0) -> Tally:
    """Play the requests with pages of a size. Blocks for seconds; changes the module's size."""
    kv_pool.PAGE_TOKENS = page_tokens
    rng, storage = random.Random(seed), _Counted()
    pool = KVPool(_POOL_TOKENS // page_tokens, storage)
    system = pool.allocate(_COMMON)
    pool.append(system, range(-1, _COMMON - 1))
    pool.commit(system, range(_COMMON))
    storage.moved = 0
    running: list[tuple[PagedSequence, int]] = []
    used = held = 0
    seconds = 0.0
    for _ in range(_STEPS):
        while len(running) < _RUNNING:
            running.append(_begin(pool, system, rng))
        begun = time.perf_counter()
        for sequence, _ in running:
            _step(pool, sequence, rng)
        seconds += time.perf_counter() - begun
        used += pool.usage.used * page_tokens
        held += _held(running, page_tokens)
        running = _without_ended(pool, running)
    steps = _STEPS * _RUNNING
    shared = _COMMON // page_tokens * page_tokens / _COMMON
    return Tally(page_tokens, 1 - held / used, shared, 1e6 * seconds / steps, storage.moved / steps)


def _begin(pool: KVPool, system: PagedSequence, rng: random.Random) -> tuple[PagedSequence, int]:
    """A request that forks the common beginning, as far as whole pages hold it."""
    prompt, output = rng.randrange(20, 800), rng.randrange(16, 256)
    whole = _COMMON // kv_pool.PAGE_TOKENS * kv_pool.PAGE_TOKENS
    sequence = pool.fork(system, whole, _COMMON + prompt + output + _NODES)
    rest = _COMMON + prompt - whole
    pool.append(sequence, range(-1, rest - 1))
    pool.commit(sequence, range(rest))
    return sequence, sequence.length + output


def _step(pool: KVPool, sequence: PagedSequence, rng: random.Random) -> None:
    """A root with a tree below it, of which some path is accepted."""
    parents = [-1, *(rng.randrange(row) for row in range(1, _NODES))]
    pool.append(sequence, parents)
    path = [0]
    while below := [row for row in range(_NODES) if parents[row] == path[-1]]:
        path.append(below[0])
        if rng.random() < 0.4:
            break
    pool.commit(sequence, path)


def _held(running: Sequence[tuple[PagedSequence, int]], page_tokens: int) -> int:
    """Positions that hold something, the shared ones once."""
    whole = _COMMON // page_tokens * page_tokens
    return _COMMON + sum(sequence.length - whole for sequence, _ in running)


def _without_ended(
    pool: KVPool, running: Sequence[tuple[PagedSequence, int]]
) -> list[tuple[PagedSequence, int]]:
    for sequence, end in running:
        if sequence.length >= end:
            pool.free(sequence)
    return [(sequence, end) for sequence, end in running if not sequence.freed]


def main() -> None:
    """Print a line of JSON for each size."""
    for size in SIZES:
        print(json.dumps({k: round(v, 3) for k, v in asdict(measure(size)).items()}))


if __name__ == "__main__":
    main()
