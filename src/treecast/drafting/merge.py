"""Several drafters as one: the union of their trees. Unlike drafters gain most by it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import TypeVar

import structlog

from treecast.drafting.base import Drafter, DraftRequest, ModelDrafter
from treecast.drafting.growth import parse_growth
from treecast.drafting.isolation import Turn, each_alone
from treecast.errors import InvalidRequest, TreecastError
from treecast.sampling.noise import derived_key
from treecast.tree import MAX_PROPOSERS, TokenTree, merge

Grown = TypeVar("Grown")

log = structlog.get_logger()


def _ignore(name: str, seconds: float) -> None:
    """Nobody measures."""


class MergedDrafter:
    """Drafts with all its drafters; bit k of a node's proposers stands for `names[k]`.

    Each drafter may fill the whole budget; of the union the nodes of highest path confidence stay,
    so a drafter that knows nothing of a text leaves its share to the others. Draws are never chosen
    among: their union is cut level by level. What one drafter fails at for a session, it alone
    loses, and for that session alone.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        observe: Callable[[str, float], None] = _ignore,
        threads: Executor | None = None,
    ) -> None:
        """Merge drafters.

        Args:
            observe: called with a drafter's name and the seconds that each of its drafts took.
            threads: where models draft side by side, for those with devices of their own; None
                lets them take turns, each with all of the cores that they share. Lookups take
                less than a millisecond and never need a thread.

        Raises:
            InvalidRequest: two of the same name, or vocabularies of different sizes.
        """
        assert 1 <= len(drafters) <= MAX_PROPOSERS, f"{len(drafters)} drafters"
        self._drafters = list(drafters)
        self._observe = observe
        self._threads = threads
        self._members: dict[int, list[int]] = {}
        self._lost: dict[int, Exception] = {}
        _check_names(self.names)
        _check_vocabularies(drafters)

    @property
    def drafters(self) -> tuple[Drafter, ...]:
        """By bit."""
        return tuple(self._drafters)

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
            InvalidRequest: the request's growth policy is none.
            Exception: none takes it; the first one's reason.
        """
        if request.speculation.growth:
            parse_growth(request.speculation.growth)  # even where no drafter here would look at it
        refusals: list[Exception] = []
        members: list[int] = []
        for index, drafter in enumerate(self._drafters):
            own = replace(request, draft_key=derived_key(request.draft_key, f"{index}"))
            try:
                drafter.open(handle, own)
                members.append(index)
            except TreecastError as error:
                refusals.append(error)
            except Exception as error:
                drafter.close(handle)
                log.error("draft.failed", drafter=drafter.name, session=handle, exc_info=error)
                refusals.append(error)
        if not members:
            raise refusals[0]
        self._members[handle] = members

    def commit(self, handle: int, tokens: Sequence[int]) -> None:
        """Tell every drafter that has the session.

        Raises:
            Exception: what the last of them that was left failed with.
        """
        for index in list(self._members[handle]):
            try:
                self._drafters[index].commit(handle, tokens)
            except Exception as error:
                self._drop(index, handle, error)
        if handle in self._lost:
            raise self._lost.pop(handle)

    def draft(self, budgets: dict[int, int], tokens_per_s: float = 0.0) -> dict[int, TokenTree]:
        """The union of what the drafters grow, as far as they have got; see `is_behind`.

        Sessions that no drafter could draft for are missing; `take_lost` says why.
        """

        def draft(drafter: Drafter, mine: dict[int, int]) -> dict[int, TokenTree]:
            began = time.perf_counter()
            grown = drafter.draft(mine, tokens_per_s)
            self._observe(drafter.name, time.perf_counter() - began)
            return grown

        trees: dict[int, list[TokenTree]] = {}
        for index, grown in self._each(budgets, draft):
            for handle, tree in grown.items():
                trees.setdefault(handle, []).append(_sign(tree, index))
        return {handle: merge(grown, budgets[handle]) for handle, grown in trees.items()}

    def take_lost(self) -> dict[int, Exception]:
        """Sessions that lost their last drafter since this was asked, and what it failed with."""
        lost, self._lost = self._lost, {}
        return lost

    def is_behind(self, handle: int) -> bool:
        """Whether one of the session's drafters has committed text left to compute."""
        return any(drafter.is_behind(handle) for drafter in self._computing(handle))

    def run_ahead(self, budgets: dict[int, int]) -> set[int]:
        """Let those run ahead that can; returns the sessions that have more to compute."""

        def run(drafter: Drafter, mine: dict[int, int]) -> dict[int, None]:
            ahead = drafter.run_ahead(mine) if isinstance(drafter, ModelDrafter) else ()
            return dict.fromkeys(ahead)

        return {handle for _, unfinished in self._each(budgets, run) for handle in unfinished}

    def foresaw(self, handle: int) -> bool:
        """Whether one of the session's drafters did."""
        return any(drafter.foresaw(handle) for drafter in self._computing(handle))

    def close(self, handle: int) -> None:
        """Close the session everywhere."""
        self._lost.pop(handle, None)
        for index in self._members.pop(handle, ()):
            self._drafters[index].close(handle)

    def _each(
        self, budgets: dict[int, int], work: Callable[[Drafter, dict[int, int]], dict[int, Grown]]
    ) -> Iterator[tuple[int, Mapping[int, Grown]]]:
        """Let every drafter do its share; yields what each did, in their order."""

        def take_turn(index: int, mine: dict[int, int]) -> Turn[Grown]:
            return each_alone(mine, lambda some: work(self._drafters[index], some))

        shares = {index: self._share(index, budgets) for index in range(len(self._drafters))}
        models = [index for index in shares if isinstance(self._drafters[index], ModelDrafter)]
        started = {
            index: self._threads.submit(take_turn, index, shares[index])
            for index in models
            if self._threads and len(models) > 1 and shares[index]
        }
        for index, mine in shares.items():
            if not mine:
                continue
            turn = started[index].result() if index in started else take_turn(index, mine)
            for handle, error in turn.failures.items():
                self._drop(index, handle, error)
            yield index, turn.done

    def _share(self, index: int, budgets: dict[int, int]) -> dict[int, int]:
        return {handle: n for handle, n in budgets.items() if index in self._members[handle]}

    def _drop(self, index: int, handle: int, error: Exception) -> None:
        """A drafter goes on without a session; the session, without it."""
        self._drafters[index].close(handle)
        self._members[handle].remove(index)
        if self._members[handle]:
            log.error("draft.failed", drafter=self.names[index], session=handle, exc_info=error)
        else:
            self._lost[handle] = error  # told to the caller

    def _computing(self, handle: int) -> Iterator[ModelDrafter]:
        drafters = (self._drafters[index] for index in self._members[handle])
        return (drafter for drafter in drafters if isinstance(drafter, ModelDrafter))


def _sign(tree: TokenTree, index: int) -> TokenTree:
    """The tree with bit `index` for its proposer; changes the given one."""
    tree.proposers = [1 << index] * len(tree)
    tree.groups = [replace(group, proposers=1 << index) for group in tree.groups]
    return tree


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequest(f"{names.count(name)} drafters are named {name!r}; one may be")


def _check_vocabularies(drafters: Sequence[Drafter]) -> None:
    """Drafters with vocabularies have one size: a node's token means the same to all."""
    sized = [drafter for drafter in drafters if drafter.vocab_size]
    for drafter in sized[1:]:
        if drafter.vocab_size != sized[0].vocab_size:
            raise InvalidRequest(
                f"drafter {drafter.name} has a vocabulary of {drafter.vocab_size} tokens; that of "
                f"{sized[0].name} has {sized[0].vocab_size}"
            )
