"""Growing a tree out of what a text's repetitions suggest, best first: what lookups share."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import Protocol, TypeVar

from treecast.draws import DrawGroup, Draws
from treecast.sampling.params import Law
from treecast.tree import MAX_DEPTH, ROOT, TokenTree

Place = TypeVar("Place")


class Lookup(Protocol[Place]):
    """A text that is asked what may come next, after its end and after guesses."""

    @property
    def end(self) -> Place:
        """Where the text's end stands."""

    def follow(self, place: Place, path: Sequence[int], token: int) -> Place:
        """The place of text + path + token, given that of text + path."""

    def next_tokens(self, place: Place, path: Sequence[int]) -> dict[int, float]:
        """The belief in each token that may follow text + path; they sum to less than 1."""


def grow(
    lookup: Lookup[Place], max_nodes: int, max_depth: int = MAX_DEPTH, law: Law = Law.REPLAY
) -> TokenTree:
    """The tree of highest path confidence that a lookup suggests, with what its law must know."""
    tree = _best(lookup, max_nodes, max_depth)
    if law is Law.MSS:
        _declare_certain(tree)
    return tree


def _declare_certain(tree: TokenTree) -> None:
    """Each node as a group of its own, in place: the text alone made the guess, with no chance in
    it, so it counts as drawn from a distribution that has nothing else.
    """
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        tree.groups.append(DrawGroup(parent, Draws.certain(token)))


def _best(lookup: Lookup[Place], max_nodes: int, max_depth: int) -> TokenTree:
    tree = TokenTree()
    frontier: list[tuple[float, int, int, int, float, Place]] = []
    serial = itertools.count()

    def propose(parent: int, path: Sequence[int], above: float, place: Place) -> None:
        for token, belief in lookup.next_tokens(place, path).items():
            # Equal beliefs: first come, first served.
            entry = (-above * belief, next(serial), parent, token, belief, place)
            heapq.heappush(frontier, entry)

    propose(ROOT, (), 1.0, lookup.end)
    while frontier and len(tree) < max_nodes:
        negative, _, parent, token, belief, place = heapq.heappop(frontier)
        path = tree.sequence(parent)
        node = tree.add(token, parent, belief)
        if tree.depths[node] < max_depth:
            propose(node, [*path, token], -negative, lookup.follow(place, path, token))
    return tree
