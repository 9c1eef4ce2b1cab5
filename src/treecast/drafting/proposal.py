"""What a draft model proposes below a node: its likeliest next tokens and the belief in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treecast.sampling.noise import gumbel_of
from treecast.sampling.params import SamplingParams
from treecast.sampling.transforms import Context, process, warp

NUM_PERTURBED = 256
"""Likeliest tokens that get noise; the draft's tail seldom wins, and its noise would cost more
than the model's own pass."""
_LEAST_CONFIDENCE = 1e-9


@dataclass(frozen=True, slots=True)
class Proposal:
    """Children, best first, and the belief that the target picks each."""

    tokens: list[int]
    confidence: list[float]


def propose(
    logits: NDArray[np.float32],  # [vocab], the draft's
    context: Context,
    position: int,
    sampling: SamplingParams,
    noise_key: int,
    num_children: int,
) -> Proposal:
    """The top-k of `log q + g`: sampling without replacement, coupled to the target's own noise.

    At temperature 0 there is no noise, and the belief is the probability. With noise it is a
    softmax over the perturbed scores.

    Args:
        context: committed text for penalties. The path's own tokens are left out: they would cost
            a copy per node and hardly move what the target accepts.
        position: absolute position of the token to be picked.
    Source: Daliri et al. 2024 (arXiv 2408.07978); top-k of Gumbel scores: Kool et al. 2019.
    """
    scores = process(logits, context, sampling)
    if np.float32(sampling.temperature) == 0:
        ids = likeliest(scores, num_children)
        mass = np.exp(scores - scores.max()).sum()
        return _ranked(ids, scores[ids], num_children, float(mass))
    ids = likeliest(scores, NUM_PERTURBED)
    allowed = warp(scores[ids], sampling)
    ids = ids[allowed.ids]
    perturbed = allowed.scores + gumbel_of(noise_key, position, ids)
    mass = np.exp(perturbed - perturbed.max()).sum()
    return _ranked(ids, perturbed, num_children, float(mass))


def likeliest(
    scores: NDArray[np.float32],  # [vocab]
    count: int,
) -> NDArray[np.int64]:
    """Ids, ascending, of the `count` highest scores; all of them where there are fewer."""
    rest = len(scores) - count
    if rest <= 0:
        return np.arange(len(scores))
    return np.sort(np.argpartition(scores, rest)[rest:])


def _ranked(
    ids: NDArray[np.int64], scores: NDArray[np.floating], num_children: int, mass: float
) -> Proposal:
    """The best of `ids`; `mass` is the sum of exp(score - highest score) over all tokens."""
    order: Sequence[int] = np.argsort(-scores, kind="stable")[:num_children].tolist()
    belief = np.exp(scores[order] - scores[order[0]]) / mass
    return Proposal(
        tokens=ids[order].tolist(),
        confidence=np.maximum(belief, _LEAST_CONFIDENCE).tolist(),
    )
