"""What goes into the next step: prefill chunks, roots, and the tree nodes that pay."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from treecast.engine.base import Segment
from treecast.tree import ROOT, TokenTree

from .requests import Request


@dataclass(frozen=True, slots=True)
class Work:
    """One request's rows in a step.

    Attributes:
        num_pending: how many of the request's pending tokens are computed, in order.
        tree: nodes below the last of them; empty while the prompt is not finished.
        tree_price: tokens that would be committed elsewhere in the time that its nodes take.
    """

    request: Request
    num_pending: int
    tree: TokenTree
    tree_price: float = 0.0

    @property
    def samples(self) -> bool:
        """Whether the root is among the rows, so that tokens come out."""
        return self.num_pending == len(self.request.pending)

    @property
    def num_rows(self) -> int:
        return self.num_pending + len(self.tree)

    def segment(self) -> Segment:
        """The rows as the engine takes them."""
        assert self.request.sequence is not None
        pending = self.request.pending[: self.num_pending]
        if not self.samples:
            return Segment.chain(self.request.sequence, pending, wanted=())
        return Segment.rooted(self.request.sequence, pending, self.tree)

    def path(self, accepted: Sequence[int]) -> list[int]:
        """Rows to commit: the pending ones, then the accepted nodes."""
        return [*range(self.num_pending), *(self.num_pending + node for node in accepted)]


def plan(
    requests: Sequence[Request],
    trees: Sequence[TokenTree],
    step_s: Callable[[int], float],
    max_rows: int,
    tokens_per_s: float,
) -> list[Work]:
    """Divide a step's rows among requests, oldest first.

    Every decoding request gets its root. Prompts share what is left, or half of it where trees
    wait for rows. Nodes of all trees compete by confidence (`choose_nodes`), but for draws: of
    those each request may have an equal share, whatever was drawn.

    Args:
        trees: one per request, empty where there is none; confidence calibrated.
        step_s: predicted seconds of a step by its number of rows.
        tokens_per_s: what all requests together get lately; 0: a step may take its time.
    """
    roots = [request for request in requests if request.decoding][:max_rows]
    room = max_rows - len(roots)
    share = _share_of_draws(room, len(roots), len(requests))
    trees = [tree.limit(share) if tree.groups else tree for tree in trees]
    at_hand = sum(len(t) for r, t in zip(requests, trees, strict=True) if r.decoding)
    for_draws = share * sum(1 for tree in trees if tree.groups)
    for_trees = max(min(at_hand, room // 2), for_draws)
    chunks = _prefill_chunks([r for r in requests if not r.decoding], room - for_trees)
    counts = {id(request): 1 for request in roots} | chunks
    planned = [(r, tree) for r, tree in zip(requests, trees, strict=True) if id(r) in counts]
    sampling = [tree if counts[id(r)] == len(r.pending) else TokenTree() for r, tree in planned]
    base_rows = sum(counts.values())
    chosen = choose_nodes(sampling, base_rows, step_s, max_rows - base_rows, tokens_per_s)
    rows = base_rows + sum(map(len, chosen))
    return [
        Work(
            request,
            counts[id(request)],
            tree,
            tokens_per_s * (step_s(rows) - step_s(rows - len(tree))),
        )
        for (request, _), tree in zip(planned, chosen, strict=True)
    ]


def _share_of_draws(room: int, num_roots: int, num_requests: int) -> int:
    """Nodes that a tree of draws may have: a function of numbers that no draw had a part in."""
    for_trees = room if num_roots == num_requests else room // 2
    return for_trees // max(1, num_requests)


def _prefill_chunks(requests: Sequence[Request], budget: int) -> dict[int, int]:
    chunks: dict[int, int] = {}
    for request in requests:
        if budget <= 0:
            break
        chunks[id(request)] = min(len(request.pending), budget)
        budget -= chunks[id(request)]
    return chunks


def choose_nodes(
    trees: Sequence[TokenTree],
    base_rows: int,
    step_s: Callable[[int], float],
    budget: int,
    tokens_per_s: float,
) -> list[TokenTree]:
    """Pick nodes across trees while each is expected to add what its time is worth.

    Trees of draws are taken whole: a choice by confidence is a choice by what was drawn, which the
    law mss does not bear.

    Nodes go by the probability that they are accepted, the product of confidences along their
    path; a node is looked at only after its parent was taken.

    Args:
        base_rows: rows that the step has without any node.
        tokens_per_s: the price of time; see `Goodput`.

    Source: goodput as in SmartSpec (arXiv 2406.14066), applied to trees.
    """
    paths = [tree.path_confidence() for tree in trees]
    children = [_children(tree) for tree in trees]
    heap = [
        (-paths[t][node], t, node)
        for t, tree in enumerate(trees)
        if not tree.groups
        for node in children[t].get(ROOT, ())
    ]
    heapq.heapify(heap)
    taken: list[list[int]] = [[] for _ in trees]
    num_drawn = sum(len(tree) for tree in trees if tree.groups)
    rows = base_rows + num_drawn
    now_s = step_s(rows)
    while heap and rows - base_rows < budget:
        negative, t, node = heapq.heappop(heap)
        next_s = step_s(rows + 1)
        if -negative < tokens_per_s * (next_s - now_s):
            break
        taken[t].append(node)
        rows, now_s = rows + 1, next_s
        for child in children[t].get(node, ()):
            heapq.heappush(heap, (-paths[t][child], t, child))
    return [
        tree if tree.groups else tree.keep(nodes) for tree, nodes in zip(trees, taken, strict=True)
    ]


def _children(tree: TokenTree) -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parents):
        children.setdefault(parent, []).append(node)
    return children
