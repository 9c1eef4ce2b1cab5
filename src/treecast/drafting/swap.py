"""A draft model that can be replaced while sessions draft with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from treecast.drafting.base import DraftRequest
from treecast.drafting.ssm import SSMDrafter
from treecast.errors import InvalidRequest
from treecast.tree import TokenTree

T = TypeVar("T")


class SwappableDrafter:
    """One name for the draft model that is there now, and for those before it.

    A session stays with the model that it was opened in until it is closed; whoever is to move is
    opened anew. A model without sessions that is not the newest is let go, with its KV pool.
    """

    def __init__(self, first: SSMDrafter) -> None:
        self._newest = first
        self._drafters: dict[int, SSMDrafter] = {}

    @property
    def name(self) -> str:
        return self._newest.name

    @property
    def vocab_size(self) -> int:
        return self._newest.vocab_size

    @property
    def num_models(self) -> int:
        """Those that still have sessions, and the newest."""
        return len({id(self._newest), *(id(one) for one in self._drafters.values())})

    def swap(self, drafter: SSMDrafter) -> None:
        """Open sessions in another model from now on.

        Raises:
            InvalidRequest: it is called otherwise, or its vocabulary has another size.
        """
        if (drafter.name, drafter.vocab_size) != (self.name, self.vocab_size):
            raise InvalidRequest(
                f"drafter {drafter.name} with a vocabulary of {drafter.vocab_size} tokens cannot "
                f"stand for {self.name} with one of {self.vocab_size}"
            )
        self._newest = drafter

    def open(self, handle: int, request: DraftRequest) -> None:
        """See `Drafter.open`; in the newest model."""
        self._newest.open(handle, request)
        self._drafters[handle] = self._newest

    def commit(self, handle: int, tokens: Sequence[int]) -> None:
        self._drafters[handle].commit(handle, tokens)

    def draft(self, budgets: dict[int, int], tokens_per_s: float = 0.0) -> dict[int, TokenTree]:
        """See `Drafter.draft`; models with sessions draft one after the other, and each is worth
        its sessions' share of the tokens.
        """

        def work(drafter: SSMDrafter, mine: dict[int, int]) -> dict[int, TokenTree]:
            return drafter.draft(mine, tokens_per_s * len(mine) / len(budgets))

        return {
            handle: tree for grown in self._each(budgets, work) for handle, tree in grown.items()
        }

    def is_behind(self, handle: int) -> bool:
        return self._drafters[handle].is_behind(handle)

    def run_ahead(self, budgets: dict[int, int]) -> set[int]:
        ahead = self._each(budgets, lambda drafter, mine: drafter.run_ahead(mine))
        return {handle for handles in ahead for handle in handles}

    def foresaw(self, handle: int) -> bool:
        return self._drafters[handle].foresaw(handle)

    def close(self, handle: int) -> None:
        drafter = self._drafters.pop(handle, None)
        if drafter is not None:
            drafter.close(handle)

    def _each(
        self, budgets: dict[int, int], work: Callable[[SSMDrafter, dict[int, int]], T]
    ) -> list[T]:
        """What each model makes of its own sessions."""
        shares: dict[int, tuple[SSMDrafter, dict[int, int]]] = {}
        for handle, budget in budgets.items():
            drafter = self._drafters[handle]
            shares.setdefault(id(drafter), (drafter, {}))[1][handle] = budget
        return [work(drafter, mine) for drafter, mine in shares.values()]
