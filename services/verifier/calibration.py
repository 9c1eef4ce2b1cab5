"""Whether drafts are as good as they say: predicted against observed acceptance, by confidence.

Kept for each session and each set of proposers that agreed on a node, and for the whole pod; a new
session starts from what the pod knows, and the pod from taking proposers at their word. So a
boastful draft gains nothing, and one that is modest loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treecast.tree import ROOT, TokenTree

NUM_BINS = 8
_LOG_WIDTH = math.log(4)
_FIRST_EDGE = -4
"""Bins are equally wide in log-odds: their edges are odds of 4**-4, 4**-3 .. 4**2."""
MAX_CURVES = 64
"""Sets of proposers, over all speculators, that the pod keeps apart; further ones share one."""
_LEAST = 1e-3


def _confidence_at(log4_odds: float) -> float:
    return 1 / (1 + math.exp(-log4_odds * _LOG_WIDTH))


EDGES = tuple(_confidence_at(_FIRST_EDGE + place) for place in range(NUM_BINS - 1))
CENTRES = tuple(_confidence_at(_FIRST_EDGE - 0.5 + place) for place in range(NUM_BINS))
_KNOTS = np.array([0.0, *CENTRES, 1.0])


def bin_of(confidence: float) -> int:
    """The bin of a confidence in (0, 1]."""
    odds = confidence / max(1 - confidence, 1e-9)
    place = math.floor(math.log(max(odds, 1e-9)) / _LOG_WIDTH) - _FIRST_EDGE + 1
    return min(max(place, 0), NUM_BINS - 1)


@dataclass(slots=True)
class Curve:
    """Observed by predicted acceptance, forgetting slowly; shrunk towards another's ratios.

    Attributes:
        prior: accepted per predicted to begin with, by bin.
        weight: expected acceptances that the prior counts for in each bin.
        memory: what is left of a bin's past at each observation in it.
        predicted, accepted: sums by bin.
    """

    prior: tuple[float, ...] = (1.0,) * NUM_BINS
    weight: float = 4.0
    memory: float = 0.998
    predicted: list[float] = field(default_factory=lambda: [0.0] * NUM_BINS)
    accepted: list[float] = field(default_factory=lambda: [0.0] * NUM_BINS)
    _values: NDArray[np.float64] | None = None

    def saw(self, place: int, confidence: float, accepted: bool) -> None:
        """A proposal of that bin was tried."""
        self.predicted[place] = self.memory * self.predicted[place] + confidence
        self.accepted[place] = self.memory * self.accepted[place] + accepted
        self._values = None

    @property
    def ratios(self) -> tuple[float, ...]:
        """Accepted per predicted, by bin."""
        return tuple(
            (accepted + self.weight * prior) / (predicted + self.weight)
            for accepted, predicted, prior in zip(
                self.accepted, self.predicted, self.prior, strict=True
            )
        )

    @property
    def trusted(self) -> tuple[float, ...]:
        """The ratios that `apply` goes by, which may be the neighbours' too: others' prior."""
        worth = self._fit()[1:-1].tolist()
        return tuple(value / centre for value, centre in zip(worth, CENTRES, strict=True))

    def apply(self, confidence: Sequence[float]) -> NDArray[np.float64]:
        """What these confidences are worth; rises with them. Bounds: [.001, 1]."""
        if self._values is None:
            self._values = self._fit()
        worth = np.interp(confidence, _KNOTS, self._values)
        return np.clip(worth, _LEAST, 1.0)

    def _fit(self) -> NDArray[np.float64]:
        """Worth at the knots: 0, the bins' centres, 1."""
        ratios = self.ratios
        worth = [centre * ratio for centre, ratio in zip(CENTRES, ratios, strict=True)]
        weights = [predicted + self.weight for predicted in self.predicted]
        rising = isotonic([*worth, ratios[-1]], [*weights, weights[-1]])
        return np.array([0.0, *rising])


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The closest values that never fall, by weighted squares: falling neighbours are pooled.

    Source: pool adjacent violators (Ayer et al. 1955).
    """
    pools: list[tuple[float, float, int]] = []  # mean, weight, number of values
    for value, weight in zip(values, weights, strict=True):
        count = 1
        while pools and pools[-1][0] > value:
            mean, mass, size = pools.pop()
            value = (mean * mass + value * weight) / (mass + weight)
            weight, count = mass + weight, size + count
        pools.append((value, weight, count))
    return [mean for mean, _, count in pools for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Reliability:
    """Sums over all that was tried of one proposer in one bin, for metrics.

    Attributes:
        centre: confidence in the middle of the bin.
    """

    proposer: str
    centre: float
    predicted: float
    accepted: float


class PodCalibration:
    """What the pod has seen of all its sessions' proposers."""

    def __init__(self, label: Callable[[str], str] = str) -> None:
        """Begin without any.

        Args:
            label: a proposer's name as metrics have it, of which there are not too many.
        """
        self._label = label
        self._curves: dict[tuple[str, ...], Curve] = {}
        self._sums: dict[str, NDArray[np.float64]] = {}

    def curve(self, names: tuple[str, ...]) -> Curve:
        """That of nodes on which these proposers agreed."""
        if names not in self._curves and len(self._curves) >= MAX_CURVES:
            names = ()
        return self._curves.setdefault(names, Curve(weight=8.0, memory=0.9999))

    def saw(self, names: tuple[str, ...], place: int, confidence: float, accepted: bool) -> None:
        """A node that these proposed was tried."""
        self.curve(names).saw(place, confidence, accepted)
        for name in names:
            label = self._label(name)
            if label not in self._sums:
                self._sums[label] = np.zeros((NUM_BINS, 2))
            sums = self._sums[label][place]
            sums[0] += confidence
            sums[1] += accepted

    def reliability(self) -> Iterator[Reliability]:
        """Predicted and accepted so far, by proposer and bin."""
        for label, sums in list(self._sums.items()):  # read while others write
            for centre, (predicted, accepted) in zip(CENTRES, sums.tolist(), strict=True):
                yield Reliability(label, centre, predicted, accepted)


def tried(tree: TokenTree, tokens: Sequence[int]) -> dict[int, bool]:
    """The nodes whose parent was reached by the committed tokens, and whether each held the next.

    What hangs off the path says nothing: it was never tried.
    """
    picked: dict[int, int] = {}
    node = ROOT
    for token in tokens:
        picked[node] = token
        found = tree.child(node, token)
        if found is None:
            break
        node = found
    return {
        child: tree.tokens[child] == picked[parent]
        for child, parent in enumerate(tree.parents)
        if parent in picked
    }


class Calibration:
    """One session's trust in one speculator's proposers."""

    def __init__(self, pod: PodCalibration, names: Sequence[str]) -> None:
        """Begin from what the pod knows.

        Args:
            names: the speculator's proposers by bit.
        """
        self._pod = pod
        self._names = tuple(names)
        self._curves: dict[int, Curve] = {}

    def apply(self, tree: TokenTree) -> list[float]:
        """What each node's confidence is worth."""
        worth = np.empty(len(tree))
        proposers = np.array(tree.proposers)
        confidence = np.array(tree.confidence)
        for bits in set(tree.proposers):
            mine = proposers == bits
            worth[mine] = self._curve(bits).apply(confidence[mine])
        values: list[float] = worth.tolist()
        return values

    def learn(self, tree: TokenTree, tokens: Sequence[int]) -> None:
        """Compare what was offered with what was committed."""
        for node, accepted in tried(tree, tokens).items():
            self._saw(tree.proposers[node], tree.confidence[node], accepted)

    def _saw(self, bits: int, confidence: float, accepted: bool) -> None:
        place = bin_of(confidence)
        self._curve(bits).saw(place, confidence, accepted)
        self._pod.saw(self._agreed(bits), place, confidence, accepted)

    def _curve(self, bits: int) -> Curve:
        if bits not in self._curves:
            self._curves[bits] = Curve(self._pod.curve(self._agreed(bits)).trusted)
        return self._curves[bits]

    def _agreed(self, bits: int) -> tuple[str, ...]:
        return tuple(name for k, name in enumerate(self._names) if bits >> k & 1)
