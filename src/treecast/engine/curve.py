"""What a pass takes, by its number of rows."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from treecast.engine.base import Engine, KVSequence, Segment

_MEMORY = 0.995
_FEWEST_SIZES = 2
_DISTURBED = 3.0
_MOST_DISTURBED = 4
"""So many disturbed steps in a row are no disturbance: the machine, or the text, is another."""


class StepCurve:
    """Step time by number of rows: a line, fitted to what was measured at start and since.

    Least squares that forget, so that it follows the machine; a step that took far longer than
    foreseen was disturbed, and says nothing unless the next ones do too. A line, since the planner
    asks what one more row costs, and differences of single measurements are noise.

    Attributes:
        measured: seconds by number of rows, as measured at start.
    """

    def __init__(self, seconds_by_rows: Mapping[int, float]) -> None:
        self.measured = dict(seconds_by_rows)
        self._disturbed = 0
        self._weight = self._rows = self._seconds = self._squares = self._products = 0.0
        for rows, seconds in seconds_by_rows.items():
            self._add(rows, seconds)

    def __call__(self, rows: int) -> float:
        """Predicted seconds of a step of `rows` rows."""
        return self._fixed_s + self._row_s * rows

    def saw(self, rows: int, seconds: float) -> None:
        """Take in what a step took."""
        self._disturbed = 0 if seconds < _DISTURBED * self(rows) else self._disturbed + 1
        if not 0 < self._disturbed <= _MOST_DISTURBED:
            self._add(rows, seconds)

    def _add(self, rows: int, seconds: float) -> None:
        self._weight = _MEMORY * self._weight + 1
        self._rows = _MEMORY * self._rows + rows
        self._seconds = _MEMORY * self._seconds + seconds
        self._squares = _MEMORY * self._squares + rows * rows
        self._products = _MEMORY * self._products + rows * seconds

    @property
    def _row_s(self) -> float:
        spread = self._weight * self._squares - self._rows**2
        if spread <= 1e-6 * self._weight * self._squares:
            return 0.0  # only one size was seen
        return max(0.0, (self._weight * self._products - self._rows * self._seconds) / spread)

    @property
    def _fixed_s(self) -> float:
        return max(1e-6, (self._seconds - self._row_s * self._rows) / self._weight)


def measure_curve(engine: Engine, max_rows: int, repeats: int = 3, most_s: float = 20) -> StepCurve:
    """Time steps of 1, 2, 4, ... rows behind a short prefix. Blocks; leaves the pool empty.

    Fewest and most rows first: once `most_s` have passed, those two have to do.
    """
    max_rows = min(max_rows, engine.info.context_tokens - 1)
    prefix = min(64, engine.info.context_tokens - max_rows)
    sizes = sorted({min(1 << power, max_rows) for power in range(10)} | {24})
    sizes = [size for size in sizes if size <= max_rows]
    sequence = engine.allocate(prefix + max_rows)
    engine.forward([Segment.chain(sequence, [0] * prefix, [])])
    engine.commit(sequence, range(prefix))
    begin = time.monotonic()
    seconds: dict[int, float] = {}
    for size in dict.fromkeys((sizes[0], sizes[-1], *sizes)):
        if len(seconds) < _FEWEST_SIZES or time.monotonic() - begin < most_s:
            seconds[size] = _median_step(engine, sequence, size, repeats)
    engine.free(sequence)
    return StepCurve(dict(sorted(seconds.items())))


def _median_step(engine: Engine, sequence: KVSequence, rows: int, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        segment = Segment(sequence, [0] * rows, [-1] * rows, range(rows))
        begin = time.perf_counter()
        engine.forward([segment])
        times.append(time.perf_counter() - begin)
        engine.truncate(sequence, sequence.length)
    return float(np.median(times[1:]))
