"""Growing a tree of draws: nothing that decides what is drawn next may look at what was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treecast.drafting.growth import (
    UNEXPANDED,
    Expansion,
    ExpansionVector,
    Growth,
    Selection,
    parse_growth,
)
from treecast.draws import MAX_DRAWS
from treecast.errors import InvalidRequest
from treecast.sampling.params import Law, SpeculationParams
from treecast.tree import MAX_DEPTH, ROOT

DEFAULT_VECTOR = ExpansionVector((3, 2, 1, 1))
"""For `mss`, where a speculator's own growth is another: 21 nodes at most."""


@dataclass(frozen=True, slots=True)
class DrawnVector:
    """An expansion vector of draws: `widths[i - 1]` of them below every node of depth i - 1.

    Repeats are one node, so trees may be smaller than the shape. The widths are fixed beforehand,
    and the budget cuts by position: level by level, each group whole or a prefix.
    """

    vector: ExpansionVector

    @property
    def num_children(self) -> int:
        return self.vector.num_children

    @property
    def max_passes(self) -> int:
        return self.vector.max_passes

    @property
    def is_fixed(self) -> bool:
        return self.vector.is_fixed

    def select(
        self, expansions: Sequence[Expansion], max_nodes: int, max_depth: int = MAX_DEPTH
    ) -> Selection:
        """The shape, level by level, as far as its nodes are computed and the budget goes."""
        chosen = Selection()
        level = [ROOT]
        for width in self.vector.widths[:max_depth]:
            children: list[int] = []
            for parent in level:
                index = chosen.expansion_of(parent)
                if index != UNEXPANDED:
                    children += _draw(chosen, expansions, parent, width, max_nodes)
            level = children
        return chosen

    def frontier(
        self, selection: Selection, max_nodes: int, max_depth: int = MAX_DEPTH
    ) -> list[int]:
        """All nodes above the last level that are not computed yet, while there is room below."""
        if len(selection.tree) >= max_nodes:
            return []
        return self.vector.frontier(selection, max_nodes, max_depth)


def _draw(
    chosen: Selection, expansions: Sequence[Expansion], parent: int, width: int, max_nodes: int
) -> list[int]:
    """Take the first draws below a node; returns those of its children that are new."""
    above = expansions[chosen.expansion_of(parent)]
    assert above.draws is not None, "an expansion without draws"
    count = chosen.tree.room_for(parent, above.draws.first(width), max_nodes)
    if count == 0:
        return []
    nodes = chosen.tree.draw(parent, above.draws.first(count))
    chosen.expansions += [
        above.computed.get(chosen.tree.tokens[node], UNEXPANDED) for node in nodes
    ]
    return nodes


def check_growth(speculation: SpeculationParams) -> None:
    """Refuse what no drafter would grow by.

    Raises:
        InvalidRequest: no growth policy, or one that the law cannot serve.
    """
    if speculation.growth:
        growth_for(speculation, parse_growth(speculation.growth))


def growth_for(speculation: SpeculationParams, growth: Growth) -> Growth:
    """A request's growth, asked for or its drafter's own, as its law can serve it.

    Raises:
        InvalidRequest: asked for one that chooses nodes by what was drawn, or that draws too often.
    """
    if speculation.law is Law.REPLAY:
        return growth
    if isinstance(growth, ExpansionVector):
        if (widest := max(growth.widths)) > MAX_DRAWS:
            raise InvalidRequest(
                f"growth under law mss has a width of {widest}; at most {MAX_DRAWS} draws are made "
                "below a node"
            )
        return DrawnVector(growth)
    if speculation.growth:
        raise InvalidRequest(
            f"growth under law mss is {speculation.growth!r}; allowed: widths by level such as "
            f"{DEFAULT_VECTOR}"
        )
    return DrawnVector(DEFAULT_VECTOR)
