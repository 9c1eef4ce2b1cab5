"""What dividing a model among processes costs: `python -m treecast.bench.group --tp 3`.

Prints, for one process and for the group, the median time of a step by its number of rows, and for
the group also what rank 0's orders alone take: an order that has everybody meet, once per step.
All on this host, over gloo and the loopback; the ranks share the threads that one process has.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from treecast.checkpoints import ensure_default_target
from treecast.engine.base import Engine, Segment
from treecast.engine.openmp import spin_briefly
from treecast.engine.sharding.shape import ALONE, GroupShape, Place

CONTEXT = 192
ROWS = (1, 8, 24)
STEPS = 25
POOL_TOKENS = 1024


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=None, help="folder; the default model's")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of all ranks together")
    given = parser.parse_args(argv)
    folder = given.model or ensure_default_target()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    spin_briefly()
    print(f"rows: {ROWS}; median ms of {STEPS} steps, exact, bfloat16")
    for shape in (ALONE, GroupShape(given.tp, given.pp)):
        _measure(folder, shape, given.threads)


def _measure(folder: Path, shape: GroupShape, threads: int) -> None:
    """Run a group of processes to its end; rank 0 prints."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as meeting:
        store = f"file://{meeting}/store"
        ranks = [
            context.Process(target=_rank, args=(folder, Place(rank, shape), store, threads))
            for rank in range(shape.size)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()


def _rank(folder: Path, place: Place, store: str, threads: int) -> None:
    from treecast.engine.hf import HFEngine
    from treecast.engine.loading import LoadOptions, resolve_dtype
    from treecast.engine.sharding.ranks import Member, follow, lead

    shape = place.shape
    if shape == ALONE:
        return _report(HFEngine.load(folder, threads=threads, pool_tokens=POOL_TOKENS), shape)
    options = LoadOptions(
        resolve_dtype("auto"), "exact", "cpu", max(1, threads // shape.size), shape
    )
    member = Member(place, folder, options, POOL_TOKENS, store, timeout_s=60)
    if place.rank:
        return follow(member)
    engine = lead(member)
    _report(engine, shape)
    engine.close()
    return None


def _report(engine: Engine, shape: GroupShape) -> None:
    sequence = engine.allocate(CONTEXT + max(ROWS))
    engine.forward([Segment.chain(sequence, [5] * CONTEXT, [])])
    engine.commit(sequence, range(CONTEXT))

    def step(rows: int) -> None:
        engine.forward([Segment(sequence, [7] * rows, [-1] * rows, range(rows))])
        engine.truncate(sequence, CONTEXT)

    times = [f"{_median_ms(lambda rows=rows: step(rows)):.1f}" for rows in ROWS]  # type: ignore[misc]
    print(f"tp {shape.tp}, pp {shape.pp}: {' / '.join(times)}", end="")
    print(f"; an order and a meeting {_median_ms(engine.check):.2f}" if shape != ALONE else "")


def _median_ms(act: Callable[[], object]) -> float:
    act()
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        act()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


if __name__ == "__main__":
    main()
