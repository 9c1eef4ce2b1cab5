"""Multi-step speculative sampling: a node's draws are tried one by one, then the rest is sampled.

A draw x from the draft's distribution q is accepted with probability min(1, r(x) / q(x)), where r
is what is left of the target's distribution; when it is rejected, r becomes the normalised positive
part of r - q. Draws of one group share their q; without replacement, a rejected draw's mass leaves
it. The groups of several proposers are tried one after another, each with its own q. What comes out
is distributed as the target's, as each stage is exact for any r, if the draws are real draws from
their q, and if nothing that decided which draws are there depended on what they are.

Source: SpecInfer (arXiv 2305.09781), algorithm 2; without replacement: Sequoia (arXiv 2402.12374).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treecast.draws import Draws, Proposal, distribution, exclude
from treecast.errors import InvalidTree
from treecast.sampling.decisions import Decisions, Uniforms
from treecast.sampling.params import SamplingParams
from treecast.sampling.pick import Picker, scores_of
from treecast.sampling.transforms import Context, warp
from treecast.tree import TokenTree


@dataclass(frozen=True, slots=True)
class MSS:
    """The law `mss`.

    Attributes:
        decisions: chances of a node, by noise key and position.
    """

    decisions: Callable[[int, int], Decisions] = Uniforms

    def check(self, tree: TokenTree) -> None:
        """Every node must be a draw of some group below its parent.

        Raises:
            InvalidTree: the first node that is not.
        """
        drawn = {(group.parent, token) for group in tree.groups for token in group.draws.drawn}
        for node, place in enumerate(zip(tree.parents, tree.tokens, strict=True)):
            if place not in drawn:
                raise InvalidTree(
                    f"node {node} is no draw of a group; law mss needs the draws and their "
                    "distribution"
                )

    def takes_likeliest(self, picker: Picker) -> bool:
        """It looks at the whole distribution."""
        return False

    def next_token(
        self, tree: TokenTree, node: int, logits: NDArray[np.float32], picker: Picker
    ) -> int:
        """The first draw accepted, else a token of what is left of the target's distribution."""
        decisions = self.decisions(picker.noise_key, picker.context.length)
        left = target_probs(logits, picker.context, picker.sampling)
        for group in tree.groups_below(node):
            accepted, left = try_draws(group.draws, left, decisions)
            if accepted is not None:
                return accepted
        return decisions.choose(left)


def target_probs(
    logits: NDArray[np.float32],  # [vocab]
    context: Context,
    sampling: SamplingParams,
) -> NDArray[np.float64]:  # [vocab]
    """The distribution of the token after `context`, as `pick` samples it; sums to 1.

    Raises:
        TreecastError: the row holds NaN or infinity, or no finite value.
    """
    scores = scores_of(logits, context, sampling)
    probs = np.zeros(len(scores))
    if np.float32(sampling.temperature) == 0:
        probs[scores.argmax()] = 1.0
        return probs
    candidates = warp(scores, sampling)
    masses = np.exp(candidates.scores - candidates.scores.max())
    probs[candidates.ids] = masses / masses.sum()
    return probs


def try_draws(
    draws: Draws,
    left: NDArray[np.float64],  # [vocab]
    decisions: Decisions,
) -> tuple[int | None, NDArray[np.float64]]:
    """Try a group's draws in order.

    Returns:
        The token accepted, or None and what is left of the distribution once all are rejected.
    """
    ids = np.array(draws.ids)
    draft_probs = distribution(draws.weights)
    for token in draws.drawn:
        place = draws.ids.index(token)
        if decisions.accepts(left[token] / draft_probs[place]):
            return token, left
        left = _residual(left, ids, draft_probs)
        if draws.kind is Proposal.WITHOUT_REPLACEMENT:
            draft_probs = exclude(draft_probs, place)
    return None, left


def _residual(
    left: NDArray[np.float64],  # [vocab]
    ids: NDArray[np.int64],  # [n]
    draft_probs: NDArray[np.float64],  # [n]
) -> NDArray[np.float64]:
    """The normalised positive part of left - draft.

    Were the two equal, no draw could be rejected; what rounding makes of that keeps `left`.
    """
    rest = left.copy()
    rest[ids] = np.maximum(rest[ids] - draft_probs, 0.0)
    mass = float(rest.sum())
    if mass <= 0:
        return left
    rest /= mass
    return rest
