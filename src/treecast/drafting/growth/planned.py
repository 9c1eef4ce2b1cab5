"""Growth by plan: the optimal tree for the acceptance measured so far, whatever the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from treecast.drafting.growth.acceptance import NUM_RANKS, Acceptance
from treecast.drafting.growth.base import UNEXPANDED, Expansion, Selection
from treecast.drafting.growth.optimal import Shape, Size, StepCost
from treecast.errors import InvalidRequest
from treecast.tree import MAX_DEPTH, MAX_NODES, ROOT

MAX_PASSES = 8
"""Levels planned for; each takes a pass of the draft."""
FORM = "dp, dp:NODES or dp:NODES:FIXED_MS,ROW_MS,PASS_MS"


@dataclass(slots=True)
class Planned:
    """Grow the tree of most expected tokens; plan anew when the acceptance was renewed.

    Attributes:
        acceptance: measured by whoever drafts; shared by all policies of a drafter.
        max_nodes: plan no more than this, whatever is granted.
        cost: what a round takes; with it, size and depth are those of most tokens per second.
    """

    acceptance: Acceptance
    max_nodes: int = MAX_NODES
    cost: StepCost | None = None
    _planned: int = -1
    _shapes: dict[Size, Shape] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.max_nodes <= MAX_NODES:
            raise InvalidRequest(f"dp plans {self.max_nodes} nodes; allowed: 1..{MAX_NODES}")
        cost = self.cost
        if cost and not (cost.fixed_s > 0 and cost.row_s >= 0 and cost.pass_s >= 0):
            raise InvalidRequest(
                f"dp has costs {cost}; a step takes time, no part of it less than 0"
            )

    @classmethod
    def parse(cls, text: str, acceptance: Acceptance) -> Planned:
        """Read `dp`, `dp:24`, or with what a round takes, `dp:24:10,0.3,2`.

        Raises:
            InvalidRequest: not of this form, or out of bounds.
        """
        _, _, rest = text.partition(":")
        nodes, _, cost = rest.partition(":")
        try:
            max_nodes = int(nodes) if nodes else MAX_NODES
            milliseconds = [float(part) / 1000 for part in cost.split(",")] if cost else []
            return cls(acceptance, max_nodes, StepCost(*milliseconds) if cost else None)
        except (ValueError, TypeError):
            raise InvalidRequest(f"growth is {text!r}; it must be {FORM}") from None

    @property
    def num_children(self) -> int:
        return NUM_RANKS

    @property
    def max_passes(self) -> int:
        return MAX_PASSES

    @property
    def is_fixed(self) -> bool:
        return False

    def select(
        self, expansions: Sequence[Expansion], max_nodes: int, max_depth: int = MAX_DEPTH
    ) -> Selection:
        """The planned tree as far as its nodes are computed."""
        shape = self._shape(max_nodes, max_depth)
        selection = Selection()
        places: dict[int, int] = {ROOT: ROOT}
        for node, (parent, rank) in enumerate(zip(shape.parents, shape.ranks, strict=True)):
            above = selection.expansion_of(places[parent]) if parent in places else UNEXPANDED
            if above != UNEXPANDED and rank < len(expansions[above].tokens):
                places[node] = selection.add(expansions, places[parent], rank)
        return selection

    def frontier(
        self, selection: Selection, max_nodes: int, max_depth: int = MAX_DEPTH
    ) -> list[int]:
        """Nodes that are to have children and are not computed yet."""
        shape = self._shape(max_nodes, max_depth)
        inner, planned = set(shape.parents), _places(selection, shape)
        return [node for node in selection.unexpanded(max_depth) if planned[node] in inner]

    def _shape(self, max_nodes: int, max_depth: int) -> Shape:
        size = Size(min(max_nodes, self.max_nodes), min(max_depth, MAX_PASSES))
        if self._planned != self.acceptance.version:
            self._planned = self.acceptance.version
            self._shapes.clear()
        if size not in self._shapes:
            trees = self.acceptance.trees(size)
            self._shapes[size] = trees.tree(trees.fastest(self.cost, size) if self.cost else size)
        return self._shapes[size]


def _places(selection: Selection, shape: Shape) -> dict[int, int]:
    """Which node of the shape each selected one is: siblings were selected in order of rank."""
    nodes = {place: node for node, place in enumerate(zip(shape.parents, shape.ranks, strict=True))}
    places, num_children = {ROOT: ROOT}, Counter[int]()
    for node, parent in enumerate(selection.tree.parents):
        places[node] = nodes[places[parent], num_children[parent]]
        num_children[parent] += 1
    return places
