"""Several drafters as one: the union of their trees. Unlike drafters gain most by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from treecast.drafting.base import Drafter, DraftRequest, ModelDrafter
from treecast.errors import TreecastError
from treecast.sampling.noise import derived_key
from treecast.tree import TokenTree, merge

MAX_DRAFTERS = 8
"""A node's proposers are one byte of bits."""


def _ignore(name: str, seconds: float) -> None:
    """Nobody measures."""


class MergedDrafter:
    """Drafts with all its drafters; bit k of a node's proposers stands for `names[k]`.

    Each drafter may fill the whole budget; of the union the nodes of highest path confidence stay,
    so a drafter that knows nothing of a text leaves its share to the others. Draws are never chosen
    among: their union is cut level by level.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        observe: Callable[[str, float], None] = _ignore,
    ) -> None:
        """Merge drafters.

        Args:
            observe: called with a drafter's name and the seconds that each of its drafts took.
        """
        assert 1 <= len(drafters) <= MAX_DRAFTERS, f"{len(drafters)} drafters"
        self._drafters = list(drafters)
        self._observe = observe
        self._members: dict[int, list[int]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Proposer names by bit."""
        return tuple(drafter.name for drafter in self._drafters)

    @property
    def name(self) -> str:
        return "+".join(self.names)

    @property
    def vocab_size(self) -> int:
        """That of the drafters that have one; they have the same."""
        return max(drafter.vocab_size for drafter in self._drafters)

    def open(self, handle: int, request: DraftRequest) -> None:
        """Open the session in every drafter that takes it.

        Raises:
            TreecastError: none takes it; the first one's reason.
        """
        refusals: list[TreecastError] = []
        members: list[int] = []
        for index, drafter in enumerate(self._drafters):
            own = replace(request, draft_key=derived_key(request.draft_key, f"{index}"))
            try:
                drafter.open(handle, own)
                members.append(index)
            except TreecastError as error:
                refusals.append(error)
        if not members:
            raise refusals[0]
        self._members[handle] = members

    def commit(self, handle: int, tokens: Sequence[int]) -> None:
        """Tell every drafter that has the session."""
        for index in self._members[handle]:
            self._drafters[index].commit(handle, tokens)

    def draft(self, budgets: dict[int, int]) -> dict[int, TokenTree]:
        """The union of what the drafters grow, as far as they have got; see `is_behind`."""
        trees: dict[int, list[TokenTree]] = {}
        for index, drafter in enumerate(self._drafters):
            mine = self._share(index, budgets)
            began = time.perf_counter()
            grown = drafter.draft(mine) if mine else {}
            if mine:
                self._observe(drafter.name, time.perf_counter() - began)
            for handle, tree in grown.items():
                trees.setdefault(handle, []).append(_sign(tree, index))
        return {handle: merge(grown, budgets[handle]) for handle, grown in trees.items()}

    def is_behind(self, handle: int) -> bool:
        """Whether one of the session's drafters has committed text left to compute."""
        return any(drafter.is_behind(handle) for drafter in self._computing(handle))

    def run_ahead(self, budgets: dict[int, int]) -> set[int]:
        """Let those run ahead that can."""
        unfinished: set[int] = set()
        for index, drafter in enumerate(self._drafters):
            mine = self._share(index, budgets)
            if mine and isinstance(drafter, ModelDrafter):
                unfinished |= drafter.run_ahead(mine)
        return unfinished

    def foresaw(self, handle: int) -> bool:
        """Whether one of the session's drafters did."""
        return any(drafter.foresaw(handle) for drafter in self._computing(handle))

    def close(self, handle: int) -> None:
        """Close the session everywhere."""
        for index in self._members.pop(handle, ()):
            self._drafters[index].close(handle)

    def _share(self, index: int, budgets: dict[int, int]) -> dict[int, int]:
        return {handle: n for handle, n in budgets.items() if index in self._members[handle]}

    def _computing(self, handle: int) -> Iterator[ModelDrafter]:
        drafters = (self._drafters[index] for index in self._members[handle])
        return (drafter for drafter in drafters if isinstance(drafter, ModelDrafter))


def _sign(tree: TokenTree, index: int) -> TokenTree:
    """The tree with bit `index` for its proposer; changes the given one."""
    tree.proposers = [1 << index] * len(tree)
    tree.groups = [replace(group, proposers=1 << index) for group in tree.groups]
    return tree
