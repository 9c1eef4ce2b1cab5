"""Times of the target's passes, interleaved so that a slow moment falls on all settings alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from treecast.bench.compare import Spread
from treecast.drafting.growth import ExpansionVector
from treecast.engine.base import Engine, KVSequence, Segment
from treecast.tree import ROOT

from .results import StepTime

CONTEXT = 192
"""Committed tokens of each request: whole pages, so that forks share them all."""
BATCHES = (1, 2, 4, 8)
ROUNDS = 9
_TOKEN = 5
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class TimedStep:
    """A pass to be timed.

    Attributes:
        rows: of each request.
    """

    setting: str
    batch: int
    rows: int
    segments: Sequence[Segment]


def parents_of(vector: ExpansionVector) -> list[int]:
    """[num_nodes] the parent of each node of the full shape, level by level."""
    parents: list[int] = []
    level = [ROOT]
    for width in vector.widths:
        first = len(parents)
        parents += [parent for parent in level for _ in range(width)]
        level = list(range(first, len(parents)))
    return parents


def width_times(
    target: Engine, vectors: Sequence[ExpansionVector], clock: Clock = time.perf_counter
) -> tuple[StepTime, ...]:
    """One plain row, and trees of these shapes, by number of requests."""
    room = 1 + max(vector.num_nodes for vector in vectors)
    with_contexts = _prefill(target, max(BATCHES), room)
    steps = []
    for batch in BATCHES:
        own = with_contexts[:batch]
        steps.append(_step("plain", own, []))
        steps += [_step(str(vector), own, parents_of(vector)) for vector in vectors]
    return _measure(target, steps, with_contexts, clock)


def shape_times(
    target: Engine,
    tree: ExpansionVector,
    chain: ExpansionVector,
    clock: Clock = time.perf_counter,
) -> tuple[StepTime, ...]:
    """A plain row, a chain, a tree, and the same tree as one sequence for each of its leaves.

    The sequences fork the request's KV, so that the text before them is not computed again; the
    forks stand ready and are not timed.
    """
    room = 1 + max(tree.num_nodes, chain.num_nodes)
    contexts = _prefill(target, max(BATCHES), room)
    leaves = _leaf_depths(tree)
    forks = [
        [context, *(target.fork(context, CONTEXT, CONTEXT + room) for _ in leaves[1:])]
        for context in contexts
    ]
    steps = []
    for batch in BATCHES:
        own = contexts[:batch]
        steps.append(_step("plain", own, []))
        steps.append(_step("chain", own, parents_of(chain)))
        steps.append(_step("tree", own, parents_of(tree)))
        steps.append(_sequences(forks[:batch], leaves))
    return _measure(target, steps, [each for some in forks for each in some], clock)


def _leaf_depths(vector: ExpansionVector) -> list[int]:
    """Length of the path to each leaf."""
    leaves = 1
    for width in vector.widths:
        leaves *= width
    return [len(vector.widths)] * leaves


def _prefill(target: Engine, count: int, room: int) -> list[KVSequence]:
    sequences = []
    for _ in range(count):
        sequence = target.allocate(CONTEXT + room)
        target.forward([Segment.chain(sequence, [_TOKEN] * CONTEXT, ())])
        target.commit(sequence, range(CONTEXT))
        sequences.append(sequence)
    return sequences


def _step(setting: str, sequences: Sequence[KVSequence], parents: Sequence[int]) -> TimedStep:
    """The root's row and those of a tree below it, for every request."""
    rows = [-1, *(parent + 1 for parent in parents)]
    tokens = [_TOKEN] * len(rows)
    segments = [Segment(each, tokens, rows, range(len(rows))) for each in sequences]
    return TimedStep(setting, len(sequences), len(rows), segments)


def _sequences(forks: Sequence[Sequence[KVSequence]], depths: Sequence[int]) -> TimedStep:
    """The root's row once more before every leaf's path: sequences share no row."""
    segments = []
    for own in forks:
        for sequence, depth in zip(own, depths, strict=True):
            tokens = [_TOKEN] * (depth + 1)
            segments.append(Segment.chain(sequence, tokens, range(depth + 1)))
    return TimedStep("sequences", len(forks), sum(depth + 1 for depth in depths), segments)


def _measure(
    target: Engine, steps: Sequence[TimedStep], sequences: Sequence[KVSequence], clock: Clock
) -> tuple[StepTime, ...]:
    """Each step once a round, after one round that does not count."""
    times_ms: list[list[float]] = [[] for _ in steps]
    try:
        for number in range(ROUNDS + 1):
            for step, times in zip(steps, times_ms, strict=True):
                began = clock()
                target.forward(step.segments)
                if number:
                    times.append(1e3 * (clock() - began))
                for segment in step.segments:
                    target.truncate(segment.sequence, CONTEXT)
    finally:
        for sequence in sequences:
            target.free(sequence)
    return tuple(
        _summary(step, Spread.of(times)) for step, times in zip(steps, times_ms, strict=True)
    )


def _summary(step: TimedStep, spread: Spread) -> StepTime:
    return StepTime(step.setting, step.batch, step.rows, spread.median, spread.lower, spread.upper)
