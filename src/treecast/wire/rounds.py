"""What became of one verified tree, for those who asked to see it."""

from __future__ import annotations

from dataclasses import dataclass

from treecast.tree import TokenTree

MAX_ROUNDS = 256
"""Rounds that are reported of one request; later ones are not."""

MAX_DRAFTS = 4
"""Speculators that may draft one request."""


@dataclass(frozen=True, slots=True)
class RoundDraft:
    """One speculator's part of a round's tree.

    Attributes:
        speculator: its instance id.
        num_nodes: what it offered; fewer may have been verified.
        came_us: when its newest tree came, since the request's arrival at the verifier; before
            the round began, if the tree is what an earlier one left over.
        drafting_us: time that drafting it took; 0 if the speculator did not say.
    """

    speculator: str
    proposers: tuple[str, ...]
    num_nodes: int
    came_us: int
    drafting_us: int


@dataclass(frozen=True, slots=True)
class Round:
    """One step of one request. Times are in microseconds.

    Attributes:
        from_index: position in the output of the round's first token.
        tree: the nodes verified, with calibrated confidence; bit k of a node's proposers stands
            for the k-th of `proposers`.
        accepted: nodes from the root's child down.
        bonus: the token after them, which is the model's own.
        drafts: who drafted the tree.
        began_us: when the step before had ended, since the request's arrival at the verifier.
        waited_us: from then to the forward pass.
        verified_us: forward pass and walk.
        prompt_tokens: those that the same pass computed.
    """

    from_index: int
    tree: TokenTree
    accepted: tuple[int, ...]
    bonus: int
    drafts: tuple[RoundDraft, ...] = ()
    began_us: int = 0
    waited_us: int = 0
    verified_us: int = 0
    prompt_tokens: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        """What the round added to the output."""
        return (*(self.tree.tokens[node] for node in self.accepted), self.bonus)

    @property
    def proposers(self) -> tuple[str, ...]:
        """Names over all drafts, in order; unique within a draft only."""
        return tuple(name for draft in self.drafts for name in draft.proposers)
