"""A drafter of random trees, some of whose branches are right: any tree must give the same text."""

from __future__ import annotations

import random
from collections.abc import Sequence

from treecast.drafting.base import DraftRequest
from treecast.tree import MAX_DEPTH, ROOT, TokenTree


class RandomTrees:
    """Grows random trees around a text that is given; see `drafting.base.Drafter`."""

    name = "random"

    def __init__(self, answer: Sequence[int], vocab_size: int, seed: int = 0) -> None:
        """`answer` is where one branch goes, as far as it is not cut off by chance."""
        self.vocab_size = vocab_size
        self._answer = list(answer)
        self._random = random.Random(seed)
        self._done = 0

    def open(self, handle: int, request: DraftRequest) -> None:
        self._done = 0

    def commit(self, handle: int, tokens: Sequence[int]) -> None:
        self._done += len(tokens)

    def draft(self, budgets: dict[int, int], tokens_per_s: float = 0.0) -> dict[int, TokenTree]:
        return {handle: self._grow(budget) for handle, budget in budgets.items()}

    def close(self, handle: int) -> None: ...

    def _grow(self, budget: int) -> TokenTree:
        """Nodes in random order: wrong ones anywhere, and at times the answer's next one."""
        tree, tip = TokenTree(), ROOT
        for _ in range(budget):
            depth = _depth(tree, tip)
            ahead = self._done + depth
            if self._random.random() < 0.4 and ahead < len(self._answer) and depth < MAX_DEPTH:
                found = tree.child(tip, self._answer[ahead])
                tip = tree.add(self._answer[ahead], tip) if found is None else found
                continue
            parent = self._random.randint(ROOT, len(tree) - 1)
            token = self._random.randrange(self.vocab_size)
            if tree.child(parent, token) is None and _depth(tree, parent) < MAX_DEPTH:
                tree.add(token, parent)
        return tree


def _depth(tree: TokenTree, node: int) -> int:
    return 0 if node == ROOT else tree.depths[node]
