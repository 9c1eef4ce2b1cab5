"""Token trees: guessed continuations of a text, checked by the LLM in one pass.

Source: SpecInfer (arXiv 2305.09781), section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter

from treecast.draws import DrawGroup, Draws, distribution
from treecast.errors import InvalidTree

ROOT = -1
"""Parent of the nodes that follow the committed text; the root itself is not a node."""

MAX_NODES = 256
MAX_DEPTH = 32
MAX_PROPOSERS = 8
"""A node's proposers are one byte of bits."""


@dataclass(slots=True, eq=True)
class TokenTree:
    """A tree of guesses below the last committed token, as flat arrays of equal length.

    A parent precedes its children and siblings have distinct tokens, so every node stands for one
    token sequence. Only `add`, `draw` and `graft` change a tree; the other methods return new ones.

    Attributes:
        tokens: token id of each node.
        parents: index of each node's parent, or `ROOT`.
        confidence: the draft's belief in (0, 1] that the target picks this child of its parent.
        proposers: bit k is set when proposer k proposed the node.
        depths: number of nodes from the root, 1 for the root's children.
        groups: where the children are draws, what was drawn and from what; parents before their
            descendants. Several groups may share a parent, and a node several draws.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    proposers: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    groups: list[DrawGroup] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def build(
        cls,
        tokens: Sequence[int],
        parents: Sequence[int],
        confidence: Sequence[float] | None = None,
        proposers: Sequence[int] | None = None,
    ) -> TokenTree:
        """Make a tree of arrays of equal length; see `add` for what is refused."""
        count = len(tokens)
        confidence = [1.0] * count if confidence is None else confidence
        proposers = [1] * count if proposers is None else proposers
        if not count == len(parents) == len(confidence) == len(proposers):
            raise InvalidTree(
                f"tree arrays differ in length: {count} tokens, {len(parents)} parents, "
                f"{len(confidence)} confidences, {len(proposers)} proposers"
            )
        tree = cls()
        for row in zip(tokens, parents, confidence, proposers, strict=True):
            tree.add(*row)
        return tree

    @classmethod
    def chain(cls, tokens: Iterable[int], confidence: float = 1.0, proposers: int = 1) -> TokenTree:
        """Make a tree of one branch."""
        tree = cls()
        for node, token in enumerate(tokens):
            tree.add(token, node - 1, confidence, proposers)
        return tree

    def add(self, token: int, parent: int, confidence: float = 1.0, proposers: int = 1) -> int:
        """Append a node and return its index.

        Raises:
            InvalidTree: the parent does not precede the node, or has a child with this token.
        """
        node = len(self.tokens)
        if not ROOT <= parent < node:
            raise InvalidTree(f"node {node} has parent {parent}; a parent precedes its child")
        if (parent, token) in self._children:
            raise InvalidTree(f"node {node} repeats token {token} among the children of {parent}")
        return self._append(token, parent, confidence, proposers)

    def draw(self, parent: int, draws: Draws, proposers: int = 1) -> list[int]:
        """Append a group of draws below `parent`; returns its distinct children, in draw order."""
        confidence = dict(zip(draws.ids, distribution(draws.weights).tolist(), strict=True))
        children: dict[int, int] = {}
        for token in draws.drawn:
            node = self.child(parent, token)
            if node is None:
                node = self.add(token, parent, confidence[token], proposers)
            self.proposers[node] |= proposers
            children[token] = node
        self.groups.append(DrawGroup(parent, draws, proposers))
        return list(children.values())

    def groups_below(self, parent: int) -> list[DrawGroup]:
        """The groups of draws below a node or `ROOT`, in the order in which they are tried."""
        return [group for group in self.groups if group.parent == parent]

    def _append(self, token: int, parent: int, confidence: float, proposers: int) -> int:
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.confidence.append(confidence)
        self.proposers.append(proposers)
        self.depths.append(1 if parent == ROOT else self.depths[parent] + 1)
        self._children[parent, token] = node
        return node

    def child(self, parent: int, token: int) -> int | None:
        """The child of `parent` (a node or `ROOT`) that holds `token`, if any."""
        return self._children.get((parent, token))

    def path(self, node: int) -> list[int]:
        """Nodes from the root's child down to `node`; empty for `ROOT`."""
        nodes: list[int] = []
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def sequence(self, node: int) -> list[int]:
        """Tokens from the root's child down to `node`."""
        return [self.tokens[step] for step in self.path(node)]

    def ancestor_bits(self) -> list[int]:
        """For each node an integer with the bits of its ancestors and of itself set."""
        bits: list[int] = []
        for node, parent in enumerate(self.parents):
            above = 0 if parent == ROOT else bits[parent]
            bits.append(above | 1 << node)
        return bits

    def path_confidence(self) -> list[float]:
        """For each node the belief that it is accepted: the product along its path.

        Never above its parent's, even where a confidence is out of bounds.
        """
        path: list[float] = []
        for parent, confidence in zip(self.parents, self.confidence, strict=True):
            above = 1.0 if parent == ROOT else path[parent]
            path.append(min(above, above * confidence))
        return path

    def validate(
        self, vocab_size: int, max_nodes: int = MAX_NODES, max_depth: int = MAX_DEPTH
    ) -> None:
        """Check what the arrays alone cannot promise.

        Raises:
            InvalidTree: too many nodes, too deep, an unknown token or a confidence out of (0, 1].
        """
        if len(self) > max_nodes:
            raise InvalidTree(f"tree has {len(self)} nodes; the limit is {max_nodes}")
        for node, (token, depth) in enumerate(zip(self.tokens, self.depths, strict=True)):
            if depth > max_depth:
                raise InvalidTree(f"tree has depth {depth}; the limit is {max_depth}")
            if not 0 <= token < vocab_size:
                raise InvalidTree(f"node {node} has token {token}; the vocabulary has {vocab_size}")
            if not 0 < self.confidence[node] <= 1:
                raise InvalidTree(
                    f"node {node} has confidence {self.confidence[node]}; the bounds are (0, 1]"
                )

    def keep(self, nodes: Iterable[int], below: int = ROOT) -> TokenTree:
        """The tree of some nodes in their order, hung under `below` as the new root.

        `nodes` must hold, with each node, its parent (unless that is `below`). Groups of draws
        are left behind: whoever chooses nodes looks at what was drawn, and then the draws are none.
        """
        kept = TokenTree()
        renamed = {below: ROOT}
        for node in sorted(nodes):
            renamed[node] = kept._append(
                self.tokens[node],
                renamed[self.parents[node]],
                self.confidence[node],
                self.proposers[node],
            )
        return kept

    def descendants(self, node: int) -> list[int]:
        """All nodes below `node` (or below `ROOT`: all), in order; without `node`."""
        inside = {node}
        below: list[int] = []
        for candidate in range(node + 1, len(self)):
            if self.parents[candidate] in inside:
                inside.add(candidate)
                below.append(candidate)
        return below

    def reroot(self, tokens: Iterable[int]) -> TokenTree | None:
        """What is left once `tokens` are committed, or None if the tree did not hold that path."""
        node = ROOT
        for token in tokens:
            found = self.child(node, token)
            if found is None:
                return None
            node = found
        below = self.descendants(node)
        rest = self.keep(below, below=node)
        # All that hangs below a node was drawn given its path alone, so it stays what it was.
        renamed = {old: new for new, old in enumerate([node, *below], start=ROOT)}
        rest.groups = [
            replace(group, parent=renamed[group.parent])
            for group in self.groups
            if group.parent in renamed
        ]
        return rest

    def limit(self, max_nodes: int, max_depth: int = MAX_DEPTH) -> TokenTree:
        """A tree within bounds: draws are cut by position, other nodes by path confidence.

        It may be this very one, so it is not to be changed.
        """
        return self._cut(max_nodes, max_depth) if self.groups else self.prune(max_nodes, max_depth)

    def _cut(self, max_nodes: int, max_depth: int) -> TokenTree:
        """Level by level, each group whole or a prefix of its draws.

        A draw is kept if, judged by those before it, there was room for one more node; so whether
        it is kept never depends on what it was. Thus a repeat goes where a new token would have
        gone, though it would need no room.
        """
        depths = [self._group_depth(group) for group in self.groups]
        num_draws = sum(len(group.draws.drawn) for group in self.groups)
        if num_draws <= max_nodes and depths[-1] <= max_depth and depths == sorted(depths):
            return self  # whatever was drawn, there was room
        cut = TokenTree()
        renamed = {ROOT: ROOT}
        for depth, group in sorted(zip(depths, self.groups, strict=True), key=itemgetter(0)):
            parent = renamed.get(group.parent)
            if parent is None or depth > max_depth:
                continue
            count = cut.room_for(parent, group.draws, max_nodes)
            if count == 0:
                continue
            draws = group.draws.first(count)
            for node in cut.draw(parent, draws, group.proposers):
                renamed[self._children[group.parent, cut.tokens[node]]] = node
        return cut

    def _group_depth(self, group: DrawGroup) -> int:
        """Depth of the children."""
        return 1 if group.parent == ROOT else self.depths[group.parent] + 1

    def room_for(self, parent: int, draws: Draws, max_nodes: int) -> int:
        """How many of some draws may be added, each where `max_nodes` was not reached before it."""
        new: set[int] = set()
        for count, token in enumerate(draws.drawn):
            if len(self) + len(new) >= max_nodes:
                return count
            if self.child(parent, token) is None:
                new.add(token)
        return len(draws.drawn)

    def prune(self, max_nodes: int, max_depth: int = MAX_DEPTH) -> TokenTree:
        """Keep the nodes of highest path confidence; a parent always outranks its child."""
        path = self.path_confidence()
        ranked = sorted(range(len(self)), key=lambda node: (-path[node], node))
        shallow = [node for node in ranked if self.depths[node] <= max_depth]
        return self.keep(shallow[:max_nodes])

    def copy(self) -> TokenTree:
        """A tree of its own with the same nodes."""
        return TokenTree(
            self.tokens.copy(),
            self.parents.copy(),
            self.confidence.copy(),
            self.proposers.copy(),
            self.depths.copy(),
            self.groups.copy(),
            self._children.copy(),
        )

    def graft(self, other: TokenTree) -> None:
        """Add `other`'s sequences, in place.

        A node found in both keeps the higher confidence and all its proposers; groups of draws are
        all kept, each with its own distribution and its repeats.
        """
        renamed = {ROOT: ROOT}
        rows = zip(other.tokens, other.parents, other.confidence, other.proposers, strict=True)
        for node, (token, parent, confidence, proposers) in enumerate(rows):
            found = self._children.get((renamed[parent], token))
            if found is None:
                found = self._append(token, renamed[parent], confidence, proposers)
            else:
                self.confidence[found] = max(self.confidence[found], confidence)
                self.proposers[found] |= proposers
            renamed[node] = found
        self.groups += [replace(group, parent=renamed[group.parent]) for group in other.groups]


def merge(trees: Sequence[TokenTree], max_nodes: int = MAX_NODES) -> TokenTree:
    """Union of trees by token sequence (SpecInfer, definition 3.2).

    Over `max_nodes` it is cut; see `TokenTree.limit`. Draws always are: one at the very bound goes
    whether or not it repeats another.
    """
    union = trees[0].copy() if trees else TokenTree()
    for tree in trees[1:]:
        union.graft(tree)
    within = len(union) <= max_nodes and not union.groups
    return union if within else union.limit(max_nodes)
