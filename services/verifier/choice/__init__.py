"""Choosing the speculator: who drafts a request, and what of the drafts is verified.

Three policies beside one another, on equal terms: `tree` verifies the union of all drafts, `spin`
gives each request the one speculator that is best for it, `vote` reduces drafts to one chain.
Under the law *replay* none of them changes a token.
"""

from __future__ import annotations

from collections.abc import Callable

from treecast.services.verifier.metrics.choice import ChoiceMetrics
from treecast.services.verifier.settings import VerifierSettings

from .base import Offer, TreePolicy
from .vote import VotePolicy

__all__ = ["Offer", "TreePolicy", "make_policy"]


def make_policy(
    settings: VerifierSettings, metrics: ChoiceMetrics, step_s: Callable[[int], float]
) -> TreePolicy:
    """The policy that the settings name.

    Args:
        step_s: predicted seconds of a step by its number of rows.
    """
    per_session = settings.speculators_per_session
    if settings.policy == "vote":
        return VotePolicy(metrics, per_session, step_s)
    if settings.policy == "spin":
        from .spin import SpinPolicy  # scipy is imported only where it is used

        return SpinPolicy(metrics, settings.reassign_steps)
    return TreePolicy(metrics, per_session)
