"""`pick`: the whole of decoding. Plain decoding and every law of acceptance call it alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treecast.errors import TreecastError
from treecast.sampling.noise import GUMBEL_MAX, gumbel_of
from treecast.sampling.params import SamplingParams
from treecast.sampling.transforms import Candidates, Context, changes_logits, process, warp

_FEW = 256
_NEAR = 3.0
_WORTH_SPARING = 0.4
"""Share of the noise: gathering what is left costs about as much as so much of it."""


def pick(
    logits: NDArray[np.float32],  # [vocab]
    context: Context,
    sampling: SamplingParams,
    noise_key: int,
) -> int:
    """Pick the token that follows `context`: argmax of (scores + noise), ties to the lowest id.

    A pure function of its arguments. The scores are the transformed logits, with no normaliser: a
    constant would not move the argmax. At temperature 0 there is no noise, and temperature, top-k,
    top-p and min-p have no effect.

    Raises:
        TreecastError: the row holds NaN or infinity, or no finite value: the model broke down.
    Source: Gumbel-max; Daliri et al. 2024 (arXiv 2408.07978).
    """
    scores = scores_of(logits, context, sampling)
    if np.float32(sampling.temperature) == 0:
        return int(scores.argmax())
    return perturbed_argmax(warp(scores, sampling), noise_key, context.length)


def scores_of(
    logits: NDArray[np.float32],  # [vocab]
    context: Context,
    sampling: SamplingParams,
) -> NDArray[np.float32]:
    """Logits under the grammar, with bias and penalties.

    Raises:
        TreecastError: the row holds NaN or infinity, or no finite value: the model broke down.
    """
    scores = process(context.masked(logits), context, sampling)
    if not np.isfinite(scores.max()):
        raise TreecastError(f"the largest logit at position {context.length} is {scores.max()}")
    return scores


def perturbed_argmax(candidates: Candidates, noise_key: int, position: int) -> int:
    """The candidate of highest score + noise, computing noise only where it can matter.

    The best sum among the leading candidates is reached by one of them; a candidate that stays
    below it even with the greatest possible noise cannot win. Rounded sums are monotone in both
    terms, so the pruning is exact.
    """
    if len(candidates.ids) > _FEW:
        candidates = _rivals(candidates, noise_key, position)
    return int(candidates.ids[_perturbed(candidates, noise_key, position).argmax()])


def _rivals(candidates: Candidates, noise_key: int, position: int) -> Candidates:
    scores = candidates.scores
    leading = candidates.where(scores >= scores.max() - _NEAR)
    reached = _perturbed(leading, noise_key, position).max()
    possible = scores + GUMBEL_MAX >= reached
    spared = 1 - np.count_nonzero(possible) / len(scores)
    return candidates.where(possible) if spared > _WORTH_SPARING else candidates


def _perturbed(candidates: Candidates, noise_key: int, position: int) -> NDArray[np.float64]:
    return candidates.scores + gumbel_of(noise_key, position, candidates.ids)


@dataclass(frozen=True, slots=True)
class Picker:
    """One request's decoding: what it asks, its noise, and its text so far."""

    sampling: SamplingParams
    noise_key: int
    context: Context

    @property
    def takes_likeliest(self) -> bool:
        """Whether a pick is the argmax of the logits as they are, ties to the lowest id."""
        sampling = self.sampling
        kind, _ = sampling.constraint
        greedy = np.float32(sampling.temperature) == 0
        return greedy and not kind and not changes_logits(sampling)

    def pick(self, logits: NDArray[np.float32]) -> int:
        """The token that follows the text so far; changes nothing."""
        return pick(logits, self.context, self.sampling, self.noise_key)

    def accept(self, token: int) -> None:
        """Take the token into the text, in place."""
        self.context.append(token)
