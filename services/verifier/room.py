"""Room in the KV pool for requests: what each needs now, and how it is made."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from treecast.engine.base import Engine
from treecast.errors import Overloaded, PromptTooLong

from .requests import Request, Roster
from .sessions import SessionStore
from .swapping import SwapSpace

GROWTH_TOKENS = 256
"""Positions that a running request reserves ahead while pages are free."""
FIRST_ROOM_TOKENS = 64
"""Positions that a request has at least for its output when it begins, or goes on."""

T = TypeVar("T")


class KVRoom:
    """Pages for requests: as many as the text fills, and more while nobody else needs them.

    Room is made by evicting idle sessions, then from what running requests reserved ahead, then by
    putting out paused ones. What trees need is made by evicting idle sessions alone.
    """

    def __init__(
        self,
        engine: Engine,
        roster: Roster,
        sessions: SessionStore,
        swap: SwapSpace,
        max_nodes: int,
    ) -> None:
        """`max_nodes`: of one request's tree."""
        self._engine = engine
        self._roster = roster
        self._sessions = sessions
        self._swap = swap
        self._max_nodes = max_nodes

    # --- accounts -------------------------------------------------------------------------------

    def check_fits(self, request: Request) -> None:
        """Refuse what the pool could not hold alone.

        Raises:
            PromptTooLong: with what it needs and what there is; waiting cannot help.
        """
        needed, usage = _last(request), self._engine.usage
        if needed > usage.total * usage.page_tokens:
            raise PromptTooLong(
                f"the request needs room for {needed} positions; the KV pool has "
                f"{usage.total * usage.page_tokens}"
            )

    @property
    def num_pages(self) -> int:
        """Pages that are free, or would be if no request had any."""
        held = sum(r.sequence.own_pages for r in self._roster.begun if r.sequence is not None)
        return self._engine.usage.free + self._sessions.idle_pages + held

    def cost(self, request: Request) -> int | None:
        """Pages of those that it takes to run in the next step; None: it waits for a sibling."""
        sequence, needed = request.sequence, self._pages(self._needed(request))
        if sequence is not None:
            return max(0, needed - sequence.shared_pages)
        if request.swapped is not None:
            return needed
        return self._sessions.cost(request, self._roster.begun, needed)

    @property
    def suffices(self) -> bool:
        """Whether everybody who runs may go on without anything being made room for."""
        lacking = 0
        for request in self._roster.running:
            assert request.sequence is not None
            if request.sequence.capacity < len(request.tokens):
                lacking += 1 + self._pages(len(request.tokens) - request.sequence.capacity)
        return lacking <= self._engine.usage.free

    def _needed(self, request: Request) -> int:
        now = len(request.tokens)
        return now if request.idle_since is None else min(_last(request), now + FIRST_ROOM_TOKENS)

    def _pages(self, positions: int) -> int:
        return -(-positions // self._engine.usage.page_tokens)

    # --- giving ---------------------------------------------------------------------------------

    def give(self, request: Request) -> bool:
        """Make room for its next step, and bring its KV into the pool if it is not there.

        Returns:
            False, and nothing done, if it should wait: somebody is computing what it can share.

        Raises:
            Overloaded: the pages cannot be had.
        """
        capacity = self._needed(request)
        if request.swapped is not None:
            self._with_room(lambda: self._swap.bring_back(request, capacity))
            self._sessions.enter(request)
        elif (sequence := request.sequence) is not None:
            self._with_room(lambda: self._engine.reserve(sequence, capacity), spared=request)
        else:
            return self._open(request, capacity)
        return True

    def _open(self, request: Request, capacity: int) -> bool:
        needed = self.cost(request)
        if needed is None:
            return False
        self._make(needed)  # first, since a session's own KV is lost if there is too little
        kept = self._with_room(lambda: self._sessions.open(request, self._roster.begun, capacity))
        if kept is not None and not request.admitted_at:
            request.cached_tokens = kept
        return kept is not None

    def give_ahead(self, request: Request) -> None:
        """Reserve for a tree in the next step and for the steps after it, if that costs nobody."""
        sequence, now = request.sequence, len(request.tokens)
        assert sequence is not None
        most = _last(request) + self._max_nodes + 1
        wanted = min(most, now + self._max_nodes + 1)
        if sequence.capacity < wanted:
            with suppress(Overloaded):
                self._engine.reserve(sequence, max(wanted, min(most, now + GROWTH_TOKENS)))
        if sequence.capacity < wanted:
            with suppress(Overloaded):
                self._sessions.with_eviction(lambda: self._engine.reserve(sequence, wanted))

    def give_back_ahead(self, request: Request) -> None:
        """Keep only the pages of what is computed."""
        assert request.sequence is not None
        self._engine.trim(request.sequence)

    def for_tree(self, request: Request) -> int:
        """Nodes that fit behind its text."""
        assert request.sequence is not None
        return max(0, request.sequence.capacity - len(request.tokens))

    def bring_ahead(self, request: Request) -> None:
        """Bring back swapped KV before its turn, if pages are free beside those for growth."""
        if request.swapped is None:
            return
        needed = self._pages(self._needed(request)) + len(self._roster.running)
        if needed <= self._engine.usage.free:
            self._swap.bring_back(request, request.swapped.length)
            self._sessions.enter(request)

    # --- making ---------------------------------------------------------------------------------

    def _with_room(self, reserve: Callable[[], T], spared: Request | None = None) -> T:
        """Reserve pages, making room as long as there are too few."""
        while True:
            try:
                return self._sessions.with_eviction(reserve)
            except Overloaded:
                if not (self._take_ahead() or self.put_out_last(spared)):
                    raise

    def _make(self, num_pages: int) -> None:
        while self._engine.usage.free + self._sessions.idle_pages < num_pages:
            if not (self._take_ahead() or self.put_out_last()):
                return

    def _take_ahead(self) -> bool:
        """Take back what a running request reserved ahead; False if none has."""
        for request in reversed(self._roster.running):
            sequence, needed = request.sequence, len(request.tokens)
            assert sequence is not None
            if self._pages(sequence.capacity) > self._pages(needed):
                self._engine.trim(sequence)
                self._engine.reserve(sequence, needed)
                return True
        return False

    def put_out_last(self, spared: Request | None = None) -> bool:
        """Put out the KV of the paused request that has the longest wait; False if none has any."""
        for request in reversed(self._roster.paused):
            if request is spared or request.sequence is None:
                continue
            if request.sequence.capacity > 0:
                self._sessions.leave(request)
                self._swap.put_out(request)
                return True
        return False


def _last(request: Request) -> int:
    """Positions of its text in the end."""
    return len(request.tokens) + request.tokens_left
