"""The tree of most expected tokens when only the ranks of children are known.

Under positional acceptance the k-th child of any node is the one accepted with probability p_k, so
a node is worth the product of the p along its path, and a tree the sum of its nodes' worth: the
expected number of accepted tokens.

Source: Sequoia (arXiv 2402.12374), section 3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treecast.tree import ROOT


@dataclass(frozen=True, slots=True)
class Shape:
    """A tree without tokens; parents precede their children.

    Attributes:
        parents: of each node, or `ROOT`.
        ranks: which of its parent's children it is, 0 the first; siblings come in this order.
    """

    parents: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.parents)

    def expected_tokens(self, acceptance: Sequence[float]) -> float:
        """Accepted tokens to be expected of one verification, the bonus token left out."""
        worth: list[float] = []
        for parent, rank in zip(self.parents, self.ranks, strict=True):
            worth.append(acceptance[rank] * (1.0 if parent == ROOT else worth[parent]))
        return sum(worth)


@dataclass(frozen=True, slots=True)
class Size:
    """Bounds of a tree."""

    max_nodes: int
    max_depth: int

    def joined(self, other: Size) -> Size:
        """The smallest that holds both."""
        return Size(max(self.max_nodes, other.max_nodes), max(self.max_depth, other.max_depth))


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a round takes: a verification step, linear in its rows, and the draft's passes."""

    fixed_s: float
    row_s: float
    pass_s: float

    def seconds(
        self,
        nodes: NDArray[np.int64],
        depth: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """Of rounds with trees of these sizes: one row more than nodes, a pass for each level."""
        return self.fixed_s + self.row_s * (nodes + 1) + self.pass_s * depth


class OptimalTrees:
    """The best trees of all sizes up to one, for one acceptance vector.

    Takes O(nodes**2 * children * depth) once; a tree of any smaller size is then read off.
    """

    def __init__(self, acceptance: Sequence[float], largest: Size) -> None:
        """Solve for all sizes.

        Args:
            acceptance: p_1, p_2, ..: probability that the k-th child is the one accepted.
        """
        self.largest = largest
        self._acceptance = tuple(acceptance)
        self._values = np.zeros((largest.max_depth + 1, largest.max_nodes + 1))
        self._choices: list[NDArray[np.int64]] = []
        for depth in range(1, largest.max_depth + 1):
            self._values[depth], choices = _one_deeper(self._values[depth - 1], self._acceptance)
            self._choices.append(choices)

    @property
    def expected_tokens(self) -> NDArray[np.float64]:
        """Accepted tokens of the best tree, by depth and number of nodes: [depth + 1, nodes + 1].

        Both are upper bounds; a smaller tree is as good where the rest is worth nothing.
        """
        return self._values

    def tree(self, size: Size) -> Shape:
        """The best tree within bounds, level by level."""
        parents: list[int] = []
        ranks: list[int] = []
        waiting = deque([(ROOT, size.max_nodes, size.max_depth)])
        while waiting:
            parent, nodes, depth = waiting.popleft()
            for rank, below in enumerate(self._divide(nodes, depth)):
                waiting.append((len(parents), below - 1, depth - 1))
                parents.append(parent)
                ranks.append(rank)
        return Shape(tuple(parents), tuple(ranks))

    def fastest(self, cost: StepCost, within: Size | None = None) -> Size:
        """The size of most expected tokens per second, the bonus token included."""
        bounds = within or self.largest
        shape = (bounds.max_depth + 1, bounds.max_nodes + 1)
        depth, nodes = np.indices(shape)
        rates = (1 + self._values[: shape[0], : shape[1]]) / cost.seconds(nodes, depth)
        best_depth, best_nodes = np.unravel_index(int(np.argmax(rates)), rates.shape)
        return Size(int(best_nodes), int(best_depth))

    def _divide(self, nodes: int, depth: int) -> list[int]:
        """How many nodes each child's subtree gets, itself included."""
        shares: list[int] = []
        while depth and nodes and len(shares) < len(self._acceptance):
            share = int(self._choices[depth - 1][len(shares), nodes])
            if share == 0:
                break
            shares.append(share)
            nodes -= share
        return shares


def optimal_tree(acceptance: Sequence[float], max_nodes: int, max_depth: int) -> Shape:
    """The tree of at most these bounds that maximises the expected accepted tokens."""
    size = Size(max_nodes, max_depth)
    return OptimalTrees(acceptance, size).tree(size)


def _one_deeper(
    below: NDArray[np.float64],  # [nodes + 1]: best worth of what hangs below a node
    acceptance: Sequence[float],
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The same for one level more, and how many nodes each child takes of how many are left.

    Children are added from the last to the first: `rest` is what later ones make of m nodes.
    """
    size = len(below)
    left, share = np.indices((size, size))  # rows: nodes left; columns: what the child takes
    possible = (share >= 1) & (share <= left)
    rest = np.zeros(size)
    subtree = np.concatenate([[0.0], 1 + below[:-1]])
    choices = np.zeros((len(acceptance), size), np.int64)
    for rank in reversed(range(len(acceptance))):
        worth = np.where(possible, acceptance[rank] * subtree + rest[left - share], 0.0)
        choices[rank] = worth.argmax(axis=1)  # 0 where no child is worth anything
        rest = worth.max(axis=1)
    return rest, choices
