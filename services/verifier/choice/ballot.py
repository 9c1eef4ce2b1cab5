"""Several drafts of one text, reduced to one chain by a weighted majority at each position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from treecast.tree import ROOT, TokenTree

from .base import Offer


@dataclass(frozen=True, slots=True)
class Ballot:
    """What one voter says comes next."""

    token: int
    confidence: float


class Panel:
    """Where each offer's tree stands along one path; offers that left the path are silent."""

    def __init__(self, offers: Sequence[Offer]) -> None:
        self._standing = [(offer, ROOT) for offer in offers]

    def ballots(self) -> dict[str, Ballot]:
        """Each voter's most confident child at the path's end; none from those without one."""
        cast: dict[str, Ballot] = {}
        for offer, node in self._standing:
            tree = offer.tree
            for child in (c for c, parent in enumerate(tree.parents) if parent == node):
                ballot = Ballot(tree.tokens[child], tree.confidence[child])
                for k, voter in enumerate(offer.voters):
                    if tree.proposers[child] >> (offer.first_bit + k) & 1:
                        cast[voter] = max(cast.get(voter, ballot), ballot, key=_rank)
        return cast

    def advance(self, token: int) -> None:
        """Extend the path."""
        moved = [(offer, offer.tree.child(node, token)) for offer, node in self._standing]
        self._standing = [(offer, node) for offer, node in moved if node is not None]

    def node(self) -> tuple[float, int]:
        """Highest confidence and all proposers of the path's last node."""
        confidence = max(offer.tree.confidence[node] for offer, node in self._standing)
        bits = 0
        for offer, node in self._standing:
            bits |= offer.tree.proposers[node]
        return confidence, bits


def elect(offers: Sequence[Offer], weight: Callable[[str], float], max_depth: int) -> TokenTree:
    """The chain of tokens that the weighted majority votes for, position by position.

    At each position every proposer whose tree holds the chain so far votes for its most confident
    child. Ends where nobody votes.

    Source: Minions (arXiv 2402.15678), majority vote of draft models; voting along trees, where a
        voter that was outvoted may vote on, is ours.
    """
    chain, panel = TokenTree(), Panel(offers)
    while len(chain) < max_depth and (ballots := panel.ballots()):
        token = _winner(ballots, weight)
        panel.advance(token)
        confidence, bits = panel.node()
        chain.add(token, len(chain) - 1, confidence, bits)
    return chain


def _winner(ballots: Mapping[str, Ballot], weight: Callable[[str], float]) -> int:
    """Most weight; of equals the more confident, then the lower token id."""
    votes: dict[int, float] = {}
    surest: dict[int, float] = {}
    for voter, ballot in ballots.items():
        votes[ballot.token] = votes.get(ballot.token, 0.0) + weight(voter)
        surest[ballot.token] = max(surest.get(ballot.token, 0.0), ballot.confidence)
    return max(votes, key=lambda token: (votes[token], surest[token], -token))


def _rank(ballot: Ballot) -> tuple[float, int]:
    return ballot.confidence, -ballot.token
