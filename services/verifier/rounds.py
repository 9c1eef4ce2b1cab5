"""A step told as the round of one request, for those who asked to see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treecast.sampling.laws import Walk
from treecast.tree import MAX_PROPOSERS, TokenTree
from treecast.wire.rounds import Round, RoundDraft

from .attachments import Attachment
from .plan import Work
from .requests import Request


@dataclass(slots=True)
class StepTimes:
    """When the running step's phases began, by `time.monotonic()`.

    Attributes:
        began: the step before had ended, or there was work again.
        forward: the forward pass began.
        ended: the walk was over.
    """

    began: float = 0.0
    forward: float = 0.0
    ended: float = 0.0


def round_of(work: Work, walked: Walk, from_index: int, times: StepTimes) -> Round:
    """What one request's rows became; `from_index` is the position of its first new token."""
    request = work.request
    began = max(times.began, request.arrived_at)
    return Round(
        from_index=from_index,
        tree=_renumbered(work.tree, request.drafted_by),
        accepted=tuple(walked.accepted),
        bonus=walked.tokens[-1],
        drafts=tuple(_draft(each, request) for each in request.drafted_by),
        began_us=_us(began - request.arrived_at),
        waited_us=_us(times.forward - began),
        verified_us=_us(times.ended - times.forward),
        prompt_tokens=work.num_pending - 1,
    )


def _draft(attachment: Attachment, request: Request) -> RoundDraft:
    peer = attachment.speculator.link.peer
    return RoundDraft(
        peer.instance_id,
        peer.proposers,
        len(attachment.offered),
        _us(attachment.offered_origin.came_at - request.arrived_at),
        attachment.offered_origin.drafting_us,
    )


def _renumbered(tree: TokenTree, drafts: Sequence[Attachment]) -> TokenTree:
    """Proposers' bits from their attachments' places to those of the drafts' names in order."""
    shifts, first = [], 0
    for each in drafts:
        shifts.append((each.place * MAX_PROPOSERS, first))
        first += len(each.speculator.link.peer.proposers)
    proposers = [
        sum((bits >> place & (1 << MAX_PROPOSERS) - 1) << to for place, to in shifts)
        for bits in tree.proposers
    ]
    return TokenTree(tree.tokens, tree.parents, tree.confidence, proposers, tree.depths)


def _us(seconds: float) -> int:
    return max(0, round(1e6 * seconds))
