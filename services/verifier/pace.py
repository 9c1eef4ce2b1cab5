"""Time as the step sees it: what rows cost, and whether waiting for trees pays."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Mapping

import numpy as np

from treecast.engine.base import Engine, KVSequence, Segment

_SMOOTHING = 0.1


class StepCurve:
    """Step time by number of rows, measured at start and refined by what steps really took.

    Between measured points it is linear; it never falls with more rows.
    """

    def __init__(self, seconds_by_rows: Mapping[int, float]) -> None:
        rows = sorted(seconds_by_rows)
        times = np.maximum.accumulate([seconds_by_rows[count] for count in rows])
        self._rows = rows
        self._seconds = [float(seconds) for seconds in times]

    def __call__(self, rows: int) -> float:
        """Predicted seconds of a step of `rows` rows."""
        return float(np.interp(rows, self._rows, self._seconds))

    def saw(self, rows: int, seconds: float) -> None:
        """Refine: the nearest measured point moves towards what was seen."""
        index = min(bisect_left(self._rows, rows), len(self._rows) - 1)
        error = seconds - self(rows)
        self._seconds[index] = max(1e-6, self._seconds[index] + _SMOOTHING * error)
        self._seconds = [float(s) for s in np.maximum.accumulate(self._seconds)]

    def by_rows(self) -> dict[int, float]:
        return dict(zip(self._rows, self._seconds, strict=True))


def measure_curve(engine: Engine, max_rows: int, repeats: int = 3) -> StepCurve:
    """Time steps of 1, 2, 4, ... rows behind a short prefix. Blocks; leaves the pool empty."""
    prefix = 64
    sizes = sorted({min(1 << power, max_rows) for power in range(10)} | {24})
    sizes = [size for size in sizes if size <= max_rows]
    sequence = engine.allocate(prefix + max_rows)
    engine.forward([Segment.chain(sequence, [0] * prefix, [])])
    engine.commit(sequence, range(prefix))
    seconds = {size: _median_step(engine, sequence, size, repeats) for size in sizes}
    engine.free(sequence)
    return StepCurve(seconds)


def _median_step(engine: Engine, sequence: KVSequence, rows: int, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        segment = Segment(sequence, [0] * rows, [-1] * rows, range(rows))
        begin = time.perf_counter()
        engine.forward([segment])
        times.append(time.perf_counter() - begin)
        engine.truncate(sequence, sequence.length)
    return float(np.median(times[1:]))


def worth_waiting(
    gain_tokens: float, rate_tokens_per_s: float, expected_s: float, patience_s: float
) -> bool:
    """Whether to wait on for trees that are missing.

    Args:
        gain_tokens: accepted tokens expected from them in the next step.
        rate_tokens_per_s: tokens that the batch would commit per second without them.
        expected_s: time until they come, going by how long they took lately; negative if overdue.
        patience_s: time after which the wait ends anyway.
    """
    return gain_tokens > rate_tokens_per_s * min(abs(expected_s), patience_s)
