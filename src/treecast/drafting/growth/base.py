"""What growth policies read and make: expansions of a draft, and trees selected among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from treecast.draws import Draws
from treecast.tree import MAX_DEPTH, ROOT, TokenTree

UNEXPANDED = -1


@dataclass(frozen=True, slots=True)
class Expansion:
    """A computed node: its children as the draft proposed them, best first.

    Attributes:
        tokens: the children's tokens; in the order of drawing, with repeats, if they are draws.
        confidence: the belief in each child, given this node; never rising, unless they are draws.
        computed: index of a child's own expansion, by its token.
        draws: what the children were drawn from, where the law needs to know.
        branch: tells the nodes of one position apart.
    """

    tokens: Sequence[int]
    confidence: Sequence[float]
    computed: dict[int, int] = field(default_factory=dict)
    draws: Draws | None = None
    branch: int = 0

    def rank(self, token: int) -> int | None:
        """Which proposal a token is, 0 the surest; None if it is none of them."""
        return self.tokens.index(token) if token in self.tokens else None


@dataclass(slots=True)
class Selection:
    """A tree made of proposals.

    Attributes:
        tree: parents before children.
        expansions: for each node the index of its expansion, or `UNEXPANDED`.
    """

    tree: TokenTree = field(default_factory=TokenTree)
    expansions: list[int] = field(default_factory=list)

    def add(self, expansions: Sequence[Expansion], parent: int, rank: int) -> int:
        """Take the proposal of that rank below `parent` (a node or `ROOT`); returns its node."""
        above = expansions[self.expansion_of(parent)]
        token = above.tokens[rank]
        self.expansions.append(above.computed.get(token, UNEXPANDED))
        return self.tree.add(token, parent, above.confidence[rank])

    def expansion_of(self, node: int) -> int:
        """Index of a node's expansion; the root's is 0."""
        return 0 if node == ROOT else self.expansions[node]

    def unexpanded(self, max_depth: int) -> list[int]:
        """Nodes that the model has not computed and whose children are not too deep."""
        return [
            node
            for node, depth in enumerate(self.tree.depths)
            if self.expansions[node] == UNEXPANDED and depth < max_depth
        ]


class Growth(Protocol):
    """A policy: the same expansions, and the same measurements, always give the same answers."""

    @property
    def num_children(self) -> int:
        """Proposals worth keeping below a node."""

    @property
    def max_passes(self) -> int:
        """Engine passes that one draft may take."""

    @property
    def is_fixed(self) -> bool:
        """Whether its shape was asked for: then no pass is left out for its cost."""

    def select(
        self, expansions: Sequence[Expansion], max_nodes: int, max_depth: int = MAX_DEPTH
    ) -> Selection:
        """The tree to offer: expansion 0 is the root's."""

    def frontier(
        self, selection: Selection, max_nodes: int, max_depth: int = MAX_DEPTH
    ) -> list[int]:
        """Nodes of the selection to compute in the next pass; empty when it is grown."""
