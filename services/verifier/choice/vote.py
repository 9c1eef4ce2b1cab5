"""All speculators' drafts reduced to one chain by vote, cut to the length that pays (Minions)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from treecast.sampling.params import Law
from treecast.services.verifier.metrics.choice import ChoiceMetrics
from treecast.tree import MAX_DEPTH, TokenTree
from treecast.wire.frames import Hello

from .ballot import Panel, elect
from .base import Offer, TreePolicy
from .hedge import Hedge
from .length import AcceptanceTrend, AdaptiveLength

if TYPE_CHECKING:
    from treecast.services.verifier.attachments import Attachment, Speculator
    from treecast.services.verifier.requests import Request

MAX_LENGTH = 16


@dataclass(slots=True)
class _Poll:
    """One request's votes: who is believed there, and what was said for the running step."""

    weights: Hedge
    offers: tuple[Offer, ...] = ()
    chain: list[int] = field(default_factory=list)


class VotePolicy(TreePolicy):
    """Verify the chain that the weighted majority of drafters votes for.

    Weights are learned per request, beginning with those learned over all requests. The chain's
    length is one for all, the one with least time per expected token. Both choose by value, so the
    law `mss` is refused: what is left of a sibling group would no longer be draws from its q.

    Source: Minions (arXiv 2402.15678).
    """

    name: ClassVar[str] = "vote"
    laws: ClassVar[frozenset[Law]] = frozenset({Law.REPLAY})

    def __init__(
        self, metrics: ChoiceMetrics, per_session: int, step_s: Callable[[int], float]
    ) -> None:
        """Begin.

        Args:
            step_s: predicted seconds of a step by its number of rows.
        """
        super().__init__(metrics, per_session)
        self._step_s = step_s
        self._all = Hedge()
        self._polls: dict[int, _Poll] = {}
        self._trend = AcceptanceTrend(MAX_LENGTH)
        self._length = AdaptiveLength(MAX_LENGTH)

    def combine(
        self, request: Request, offers: Sequence[Offer], max_nodes: int, max_depth: int
    ) -> TokenTree:
        """Elect a chain, and cut it; what is cut off is remembered, to learn from."""
        poll = self._polls.setdefault(request.handle, _Poll(self._all.copy()))
        chain = elect(offers, poll.weights.weight, min(max_depth, MAX_DEPTH))
        poll.offers, poll.chain = tuple(offers), chain.tokens
        return chain.keep(range(min(len(chain), max_nodes, self._length.value)))

    def committed(
        self, request: Request, attachments: Sequence[Attachment], tokens: Sequence[int]
    ) -> None:
        """Learn who voted for what the target picked, at each position that it went through."""
        poll = self._polls.get(request.handle)
        if poll is None or not poll.offers:
            return
        panel = Panel(poll.offers)
        for token in tokens:
            ballots = panel.ballots()
            if not ballots:
                break
            verdicts = {voter: ballot.token == token for voter, ballot in ballots.items()}
            poll.weights.saw(verdicts)
            self._all.saw(verdicts)
            panel.advance(token)
        self._trend.saw(poll.chain, tokens)
        poll.offers = ()

    def rearrange(
        self,
        attached: Mapping[int, Sequence[Attachment]],
        speculators: Sequence[Speculator],
        may_draft: Callable[[int, Speculator], bool],
    ) -> Mapping[int, Speculator]:
        """Adapt the length to the batch as it is now; nobody moves."""
        if attached:
            draft_s = max((s.pace.latency_s for s in speculators), default=0.0)
            self._length.update(
                lambda length: draft_s + self._step_s(len(attached) * (1 + length)),
                self._trend.expected_tokens(),
            )
        self._metrics.length.set(self._length.value)
        for voter, weight in self._all.weights.items():
            self._metrics.weigh(voter, weight)
        return {}

    def released(self, request: Request) -> None:
        self._polls.pop(request.handle, None)

    def gone(self, speculator: Speculator) -> None:
        """Forget its voters, what they said for the running step too."""
        voters = voter_names(speculator.link.peer)
        for poll in self._polls.values():
            poll.offers = tuple(offer for offer in poll.offers if offer.voters != voters)
        for voter in voters:
            self._all.forget(voter)
            self._metrics.forget(voter)


def voter_names(peer: Hello) -> tuple[str, ...]:
    """One per proposer of a speculator, unique over all speculators."""
    return tuple(f"{peer.instance_id}/{k}:{name}" for k, name in enumerate(peer.proposers))
