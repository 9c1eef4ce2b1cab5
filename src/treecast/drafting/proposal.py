"""What a draft model proposes below a node, and the belief in each child; four ways to choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treecast.drafting.base import DraftRequest
from treecast.draws import Draws, Proposal, distribution, exclude
from treecast.sampling.decisions import Decisions, Domain, Uniforms
from treecast.sampling.noise import gumbel_of
from treecast.sampling.params import Law, SamplingParams
from treecast.sampling.transforms import Context, process, warp

NUM_PERTURBED = 256
"""Likeliest tokens that get noise; the draft's tail seldom wins, and its noise would cost more
than the model's own pass."""
NUM_WEIGHED = 64
"""Likeliest tokens that draws are made from. All of them travel with the tree."""
_LEAST_CONFIDENCE = 1e-9


@dataclass(frozen=True, slots=True)
class Children:
    """Children and the belief that the target picks each.

    Attributes:
        tokens: best first; in the order of drawing where there are draws.
        draws: what the children were drawn from, where the law needs to know.
    """

    tokens: list[int]
    confidence: list[float]
    draws: Draws | None = None


@dataclass(frozen=True, slots=True)
class DraftPosition:
    """Where a token is proposed.

    Attributes:
        position: absolute position of the token.
        branch: tells a position's nodes apart, below 2**32.
    """

    position: int
    branch: int = 0


def propose(
    logits: NDArray[np.float32],  # [vocab], the draft's
    context: Context,
    place: DraftPosition,
    request: DraftRequest,
    num_children: int,
    path: Sequence[int] = (),
) -> Children:
    """Children by the request's proposal; no more than `num_children` draws.

    Only the committed text counts for penalties. The path's own tokens are left out: they would
    cost a copy per node and hardly move what the target accepts. A grammar follows the path.
    """
    masked = context.masked(logits, path)
    if masked.max() > -np.inf:
        logits = masked
    elif request.speculation.law is not Law.MSS:  # which needs draws, if only from the unmasked
        return Children([], [])
    sampling, proposal = request.sampling, request.speculation.proposal
    match proposal:
        case Proposal.COUPLED:
            key = request.noise_key
            return propose_coupled(logits, context, place.position, sampling, key, num_children)
        case Proposal.TOPK:
            return propose_top_k(logits, context, sampling, num_children)
    decisions = Uniforms(request.draft_key, place.position, Domain.DRAFT, place.branch)
    weighed = weigh(logits, context, sampling)
    draws = draw(weighed, proposal, num_children, decisions)
    return _drawn(draws) if request.speculation.law is Law.MSS else _best_first(draws)


@dataclass(frozen=True, slots=True)
class Weighed:
    """A sparse distribution to draw from: token ids and float32 weights, all above 0."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def weigh(
    logits: NDArray[np.float32],  # [vocab]
    context: Context,
    sampling: SamplingParams,
) -> Weighed:
    """The draft's transformed distribution over its likeliest tokens, cut before any draw."""
    scores = process(logits, context, sampling)
    if np.float32(sampling.temperature) == 0:
        return Weighed((int(scores.argmax()),), (1.0,))
    ids = likeliest(scores, NUM_WEIGHED)
    allowed = warp(scores[ids], sampling)
    masses = np.exp(allowed.scores - allowed.scores.max())
    weights = (masses / masses.sum()).astype(np.float32)
    kept = weights > 0
    return Weighed(tuple(ids[allowed.ids][kept].tolist()), tuple(weights[kept].tolist()))


def draw(weighed: Weighed, kind: Proposal, count: int, decisions: Decisions) -> Draws:
    """Draw tokens one after another; without replacement at most all there are.

    How many are drawn is known before the first.
    """
    probs = distribution(weighed.weights)
    if kind is Proposal.WITHOUT_REPLACEMENT:
        count = min(count, len(probs))
    drawn: list[int] = []
    for _ in range(count):
        place = decisions.choose(probs)
        drawn.append(weighed.ids[place])
        if kind is Proposal.WITHOUT_REPLACEMENT:
            probs = exclude(probs, place)
    return Draws(kind, weighed.ids, weighed.weights, tuple(drawn))


def _drawn(draws: Draws) -> Children:
    belief = dict(zip(draws.ids, distribution(draws.weights).tolist(), strict=True))
    return Children(list(draws.drawn), [belief[token] for token in draws.drawn], draws)


def _best_first(draws: Draws) -> Children:
    """Children for a law that looks at no distribution: repeats go, likely ones come first."""
    drawn = _drawn(draws)
    belief = dict(zip(drawn.tokens, drawn.confidence, strict=True))
    tokens = sorted(belief, key=lambda token: -belief[token])
    return Children(tokens, [max(belief[token], _LEAST_CONFIDENCE) for token in tokens])


def propose_top_k(
    logits: NDArray[np.float32],  # [vocab]
    context: Context,
    sampling: SamplingParams,
    num_children: int,
) -> Children:
    """The likeliest tokens; the target's noise is not seen, and the belief is the probability."""
    scores = process(logits, context, sampling)
    if np.float32(sampling.temperature) == 0:
        return _greedy(scores, num_children)
    ids = likeliest(scores, NUM_PERTURBED)
    allowed = warp(scores[ids], sampling)
    mass = float(np.exp(allowed.scores - allowed.scores.max()).sum())
    return _ranked(ids[allowed.ids], allowed.scores, num_children, mass)


def propose_coupled(
    logits: NDArray[np.float32],  # [vocab], the draft's
    context: Context,
    position: int,
    sampling: SamplingParams,
    noise_key: int,
    num_children: int,
) -> Children:
    """The top-k of `log q + g`: sampling without replacement, coupled to the target's own noise.

    At temperature 0 there is no noise, and the belief is the probability. With noise it is a
    softmax over the perturbed scores.

    Args:
        position: absolute position of the token to be picked.
    Source: Daliri et al. 2024 (arXiv 2408.07978); top-k of Gumbel scores: Kool et al. 2019.
    """
    scores = process(logits, context, sampling)
    if np.float32(sampling.temperature) == 0:
        return _greedy(scores, num_children)
    ids = likeliest(scores, NUM_PERTURBED)
    allowed = warp(scores[ids], sampling)
    ids = ids[allowed.ids]
    perturbed = allowed.scores + gumbel_of(noise_key, position, ids)
    mass = np.exp(perturbed - perturbed.max()).sum()
    return _ranked(ids, perturbed, num_children, float(mass))


def _greedy(
    scores: NDArray[np.float32],  # [vocab]
    num_children: int,
) -> Children:
    ids = likeliest(scores, num_children)
    mass = np.exp(scores - scores.max()).sum()
    return _ranked(ids, scores[ids], num_children, float(mass))


def likeliest(
    scores: NDArray[np.float32],  # [vocab]
    count: int,
) -> NDArray[np.int64]:
    """Ids, ascending, of the `count` highest scores; fewer where only so many are above -inf.

    Those at -inf, most of a vocabulary under a cut head, go first: among many equal scores the
    partition takes twenty times as long.
    """
    ids = np.flatnonzero(scores > -np.inf)
    rest = len(ids) - count
    return ids if rest <= 0 else np.sort(ids[np.argpartition(scores[ids], rest)[rest:]])


def _ranked(
    ids: NDArray[np.int64], scores: NDArray[np.floating], num_children: int, mass: float
) -> Children:
    """The best of `ids`; `mass` is the sum of exp(score - highest score) over all tokens."""
    order: Sequence[int] = np.argsort(-scores, kind="stable")[:num_children].tolist()
    belief = np.exp(scores[order] - scores[order[0]]) / mass
    return Children(
        tokens=ids[order].tolist(),
        confidence=np.maximum(belief, _LEAST_CONFIDENCE).tolist(),
    )
