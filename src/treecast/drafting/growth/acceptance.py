"""Which of a draft's proposals the target picks: counted by rank, as commits come in."""

from __future__ import annotations

from dataclasses import dataclass, field

from treecast.drafting.growth.optimal import OptimalTrees, Size

NUM_RANKS = 8
PRIOR = (0.40, 0.11, 0.06, 0.04, 0.03, 0.02, 0.015, 0.01)
"""Share of tokens by rank of a two-layer draft of a 135M chat model, on text held out."""
PRIOR_WEIGHT = 64.0
"""Observations that the prior counts for."""
PERIOD = 256
"""Observations between two vectors; between them the older ones lose half of their weight."""


@dataclass(slots=True)
class Acceptance:
    """Probability that the k-th proposal is the one accepted, renewed now and then.

    It depends on the ranks seen and their order alone.

    Attributes:
        vector: by rank; sums to at most 1.
        version: counts the vectors so far.
    """

    vector: tuple[float, ...] = PRIOR
    version: int = 0
    _counts: list[float] = field(default_factory=lambda: [0.0] * NUM_RANKS)
    _weight: float = 0.0
    _num_new: int = 0
    _trees: OptimalTrees | None = field(default=None, compare=False)
    _solved: int = -1

    @property
    def total(self) -> float:
        """Probability that one of a node's proposals is the one accepted."""
        return sum(self.vector)

    def trees(self, size: Size) -> OptimalTrees:
        """The best trees for the vector, up to a size at least: solved for once, for all policies.

        Solves again where the vector was renewed, or a larger size is asked for.
        """
        known = self._trees if self._solved == self.version else None
        largest = size.joined(known.largest) if known else size
        if known is None or known.largest != largest:
            self._trees = known = OptimalTrees(self.vector, largest)
            self._solved = self.version
        return known

    def saw(self, rank: int | None) -> None:
        """The target picked the proposal of that rank, from 0; None: none of them."""
        self._weight += 1
        self._num_new += 1
        if rank is not None and rank < NUM_RANKS:
            self._counts[rank] += 1
        if self._num_new == PERIOD:
            self._renew()

    def _renew(self) -> None:
        total = PRIOR_WEIGHT + self._weight
        self.vector = tuple(
            (PRIOR_WEIGHT * prior + count) / total
            for prior, count in zip(PRIOR, self._counts, strict=True)
        )
        self.version += 1
        self._counts = [count / 2 for count in self._counts]
        self._weight /= 2
        self._num_new = 0
