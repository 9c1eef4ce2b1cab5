"""Which nodes a draft model expands next, and which of its proposals make up the tree it offers.

The drafter keeps what the model proposed below every node that it computed, its *expansions*; a
growth policy reads them. The two policies are SpecInfer's fixed expansion vector (arXiv 2305.09781,
section 3) and best-first growth under a budget of nodes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import Protocol

from treecast.draws import Draws
from treecast.errors import InvalidRequest
from treecast.tree import MAX_DEPTH, MAX_NODES, ROOT, TokenTree

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
    """A policy. It keeps no state: the same expansions always give the same answers."""

    @property
    def num_children(self) -> int:
        """Proposals worth keeping below a node."""

    @property
    def max_passes(self) -> int:
        """Engine passes that one draft may take."""

    def select(
        self, expansions: Sequence[Expansion], max_nodes: int, max_depth: int = MAX_DEPTH
    ) -> Selection:
        """The tree to offer: expansion 0 is the root's."""

    def frontier(
        self, selection: Selection, max_nodes: int, max_depth: int = MAX_DEPTH
    ) -> list[int]:
        """Nodes of the selection to compute in the next pass; empty when it is grown."""


@dataclass(frozen=True, slots=True)
class BestFirst:
    """Grow where the draft is surest.

    Passes are what a draft costs. With a two-layer draft of a 135M target, trees of 16 nodes and
    lookup beside it, 26 prompts: computing all that could enter the tree 2.41 tokens per step;
    only what is reached with probability .05, 2.41 for half the time; .1, 2.39 for a third.

    Attributes:
        width: nodes computed per pass, those of highest path confidence.
        max_passes: passes per draft, which bounds what one draft may cost.
        num_children: proposals kept below a node.
        min_confidence: a node is computed only if it is believed more likely than this.
    """

    width: int = 8
    max_passes: int = 5
    num_children: int = 8
    min_confidence: float = 0.1

    def select(
        self, expansions: Sequence[Expansion], max_nodes: int, max_depth: int = MAX_DEPTH
    ) -> Selection:
        """The nodes of highest path confidence; a parent always outranks its child."""
        selection = Selection()
        heap: list[tuple[float, int, int, int, float]] = []

        def offer(parent: int, rank: int, above: float) -> None:
            source = expansions[selection.expansion_of(parent)]
            if rank < min(self.num_children, len(source.tokens)):
                path = above * source.confidence[rank]
                heapq.heappush(heap, (-path, len(selection.tree), parent, rank, above))

        offer(ROOT, 0, 1.0)
        while heap and len(selection.tree) < max_nodes:
            negative_path, _, parent, rank, above = heapq.heappop(heap)
            node = selection.add(expansions, parent, rank)
            offer(parent, rank + 1, above)
            if selection.expansions[node] != UNEXPANDED and selection.tree.depths[node] < max_depth:
                offer(node, 0, -negative_path)
        return selection

    def frontier(
        self, selection: Selection, max_nodes: int, max_depth: int = MAX_DEPTH
    ) -> list[int]:
        """The surest nodes not computed yet whose children could still enter the tree."""
        path = selection.tree.path_confidence()
        full = len(selection.tree) >= max_nodes
        floor = max(self.min_confidence, min(path) if full and path else 0.0)
        hopeful = [node for node in selection.unexpanded(max_depth) if path[node] > floor]
        hopeful.sort(key=lambda node: (-path[node], node))
        return hopeful[: self.width]


@dataclass(frozen=True, slots=True)
class ExpansionVector:
    """A fixed shape: every node of depth i - 1 gets `widths[i - 1]` children.

    Cut to the surest nodes where the budget is smaller than the shape.
    """

    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        for width in self.widths:
            if width < 1:
                raise InvalidRequest(f"expansion width is {width}; the least is 1")
        if not 1 <= len(self.widths) <= MAX_DEPTH:
            raise InvalidRequest(
                f"expansion has {len(self.widths)} levels; allowed: 1..{MAX_DEPTH}"
            )
        if self.num_nodes > MAX_NODES:
            raise InvalidRequest(
                f"expansion {self} makes trees of {self.num_nodes} nodes; the limit is {MAX_NODES}"
            )

    @classmethod
    def parse(cls, text: str) -> ExpansionVector:
        """Read `<1,1,3>` or `1,1,3`.

        Raises:
            InvalidRequest: not a list of numbers, a width below 1, or trees over 256 nodes.
        """
        numbers = text.strip().removeprefix("<").removesuffix(">").split(",")
        try:
            return cls(tuple(int(number) for number in numbers))
        except ValueError:
            raise InvalidRequest(
                f"expansion is {text!r}; it must be widths by level such as <1,1,3>"
            ) from None

    def __str__(self) -> str:
        return f"<{','.join(map(str, self.widths))}>"

    @property
    def num_nodes(self) -> int:
        """Nodes of the whole shape."""
        return sum(accumulate(self.widths, mul))

    @property
    def num_children(self) -> int:
        return max(self.widths)

    @property
    def max_passes(self) -> int:
        return len(self.widths)

    def select(
        self, expansions: Sequence[Expansion], max_nodes: int, max_depth: int = MAX_DEPTH
    ) -> Selection:
        """The shape, level by level, as far as its nodes are computed."""
        whole = Selection()
        level = [ROOT]
        for width in self.widths[:max_depth]:
            level = list(self._children(whole, expansions, level, width))
        return whole if len(whole.tree) <= max_nodes else _cut(whole, max_nodes)

    def frontier(
        self, selection: Selection, max_nodes: int, max_depth: int = MAX_DEPTH
    ) -> list[int]:
        """All nodes above the last level that are not computed yet."""
        return selection.unexpanded(min(max_depth, len(self.widths)))

    def _children(
        self,
        whole: Selection,
        expansions: Sequence[Expansion],
        level: Sequence[int],
        width: int,
    ) -> Iterator[int]:
        for parent in level:
            index = whole.expansion_of(parent)
            if index != UNEXPANDED:
                for rank in range(min(width, len(expansions[index].tokens))):
                    yield whole.add(expansions, parent, rank)


def _cut(whole: Selection, max_nodes: int) -> Selection:
    path = whole.tree.path_confidence()
    ranked = sorted(range(len(path)), key=lambda node: (-path[node], node))
    kept = sorted(ranked[:max_nodes])
    return Selection(whole.tree.keep(kept), [whole.expansions[node] for node in kept])


def parse_growth(text: str) -> Growth:
    """Read a policy: `best-first`, or an expansion vector such as `<1,1,3>`.

    Raises:
        InvalidRequest: neither of the two.
    """
    return BestFirst() if text.strip() == "best-first" else ExpansionVector.parse(text)
