"""What the report's sections measure: small records, one per prompt or per timed setting."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NUM_GUESSES = 5


@dataclass(frozen=True, slots=True)
class Guesses:
    """How often an answer's tokens were among the first 1 to 5 guesses, given the true text.

    Attributes:
        setting: decoding, and how children were proposed.
        hits: tokens within the first 1, 2, .. guesses.
        sizes: guesses made in all for that; of a union, distinct ones.
    """

    setting: str
    proposer: str
    question: str
    category: str
    num_tokens: int
    hits: tuple[int, ...]
    sizes: tuple[int, ...]

    def rate(self, count: int) -> float:
        """Share of tokens within the first `count` guesses."""
        return self.hits[count - 1] / self.num_tokens

    def size(self, count: int) -> float:
        """Guesses per token that this took."""
        return self.sizes[count - 1] / self.num_tokens


@dataclass(frozen=True, slots=True)
class Trial:
    """One answer's decoding under one setting.

    Attributes:
        nodes: tree nodes verified.
        steps_by_accepted: element d counts the steps that accepted d nodes; not empty.
    """

    setting: str
    decoding: str
    question: str
    category: str
    nodes: int
    steps_by_accepted: tuple[int, ...]

    @property
    def steps(self) -> int:
        return sum(self.steps_by_accepted)

    @property
    def tokens(self) -> int:
        """Each step gives one token more than it accepts."""
        return sum((length + 1) * n for length, n in enumerate(self.steps_by_accepted))

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps


@dataclass(frozen=True, slots=True)
class StepTime:
    """Time of one pass of the target over `batch` requests: median and quartiles.

    Attributes:
        rows: of each request.
    """

    setting: str
    batch: int
    rows: int
    median_ms: float
    lower_ms: float
    upper_ms: float


@dataclass(frozen=True, slots=True)
class Reliability:
    """Nodes that were tried, of one set of proposers in one bin of confidence.

    Attributes:
        predicted: mean confidence as drafted.
        calibrated: mean of what the verifier's calibration made of it, before it saw the outcome.
        accepted: share that was accepted.
    """

    decoding: str
    proposers: str
    tried: int
    predicted: float
    calibrated: float
    accepted: float


@dataclass(frozen=True, slots=True)
class Measurements:
    """All that a section has measured; kinds that it does not measure are empty."""

    guesses: tuple[Guesses, ...] = ()
    trials: tuple[Trial, ...] = ()
    times: tuple[StepTime, ...] = ()
    reliability: tuple[Reliability, ...] = ()

    @classmethod
    def gather(cls, parts: Iterable[Measurements]) -> Measurements:
        """All parts in order."""
        parts = list(parts)
        return cls(
            guesses=tuple(row for part in parts for row in part.guesses),
            trials=tuple(row for part in parts for row in part.trials),
            times=tuple(row for part in parts for row in part.times),
            reliability=tuple(row for part in parts for row in part.reliability),
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts and its standard error, which one prompt alone does not have."""

    mean: float
    error: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The error is the sample's standard deviation by the root of its size."""
        if len(values) == 1:
            return cls(values[0], None, 1)
        error = statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.fmean(values), error, len(values))

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.2f}"
        return f"{self.mean:.2f}{error}"
