"""All that chance could do, each with its probability: no sampling, no error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from treecast.sampling.decisions import Decisions

T = TypeVar("T")


@dataclass
class Branch:
    """Answers as told, then with the first answer that is possible; notes the others."""

    told: tuple[int, ...]
    answers: tuple[int, ...] = ()
    probability: float = 1.0
    others: list[tuple[int, ...]] = field(default_factory=list)

    def accepts(self, probability: float) -> bool:
        likely = min(1.0, probability)
        return self._answer([1 - likely, likely]) == 1

    def choose(self, weights: NDArray[np.float64]) -> int:
        return self._answer((weights / weights.sum()).tolist())

    def _answer(self, probabilities: Sequence[float]) -> int:
        asked = len(self.answers)
        possible = [answer for answer, p in enumerate(probabilities) if p > 0]
        if asked < len(self.told):
            answer = self.told[asked]
        else:
            answer = possible[0]
            self.others += [(*self.answers, other) for other in possible[1:]]
        self.answers += (answer,)
        self.probability *= probabilities[answer]
        return answer


def outcomes(run: Callable[[Decisions], T]) -> Iterator[tuple[float, T]]:
    """What `run` returns for every way in which its decisions can fall, and how likely that is."""
    waiting: list[tuple[int, ...]] = [()]
    while waiting:
        branch = Branch(waiting.pop())
        result = run(branch)
        yield branch.probability, result
        waiting += branch.others
