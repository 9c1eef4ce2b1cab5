"""Growth by an expansion vector: a fixed number of children at each level.

Source: SpecInfer (arXiv 2305.09781), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from treecast.drafting.growth.base import UNEXPANDED, Expansion, Selection
from treecast.errors import InvalidRequest
from treecast.tree import MAX_DEPTH, MAX_NODES, ROOT


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

    @property
    def is_fixed(self) -> bool:
        return True

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
