"""Retained KV: what a session's next request, or a concurrent one, need not compute again."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client import Counter

from treecast.adapter import prefix_salt
from treecast.engine.base import Engine, KVSequence
from treecast.errors import Overloaded, StaleLease
from treecast.prefix import prefix_names
from treecast.wire.frames import SessionKey

from .prefixes import PrefixIndex
from .requests import Request
from .schedule import State

Key = tuple[str, str]
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Retained:
    """KV of an idle session: `tokens` are the positions that `sequence` holds, computed with
    `adapter`.
    """

    sequence: KVSequence
    tokens: list[int]
    adapter: str
    idle_since: float


@dataclass(frozen=True, slots=True)
class Source:
    """KV that a request could begin with: a fork of somebody's pages.

    Attributes:
        shared: tokens that the holder's text and the request's have in common.
    """

    holder: Request | Retained
    shared: int

    @property
    def length(self) -> int:
        """Positions that are computed by now."""
        return min(self.shared, _length(self.holder))

    @property
    def promised(self) -> int:
        """Positions that there will be soon: all that are shared, if the holder computes them."""
        computing = isinstance(self.holder, Request) and self.holder.state is State.RUNNING
        return self.shared if computing else self.length

    @property
    def complete(self) -> bool:
        """Whether there is no more to come soon."""
        return self.length == self.promised


class SessionStore:
    """Retained sequences by (tenant, session id), least recently used first.

    A request takes over what its session retained, or forks the pages of whoever has more of its
    prompt: a running sibling to the token, anybody of its tenant by whole pages. The last of a
    session's requests to finish leaves its KV here. What was computed with one adapter is of no use
    with another: it is never shared, and a session that changes its adapter begins anew.
    """

    def __init__(self, engine: Engine, ttl_s: float, evicted: Counter) -> None:
        """`evicted` counts the sessions freed here, by `why`: expired or pressure."""
        self._engine = engine
        self._ttl_s = ttl_s
        self._evicted = evicted
        self._idle: OrderedDict[Key, Retained] = OrderedDict()
        self._epochs: OrderedDict[Key, int] = OrderedDict()
        self._prefixes: PrefixIndex[Request | Retained] = PrefixIndex()

    def __len__(self) -> int:
        return len(self._idle)

    def check_epoch(self, session: SessionKey) -> None:
        """Remember the newest lease of a session.

        Raises:
            StaleLease: a newer placement has been seen here.
        """
        key = session.name
        newest = self._epochs.get(key, 0)
        if session.epoch < newest:
            raise StaleLease(f"session lease has epoch {session.epoch}; {newest} has been seen")
        self._epochs[key] = session.epoch
        self._epochs.move_to_end(key)
        while len(self._epochs) > 100_000:
            self._epochs.popitem(last=False)

    @property
    def idle_pages(self) -> int:
        """Pages that would come free with all idle sessions, if they shared none."""
        page_tokens = self._engine.usage.page_tokens
        return sum(-(-kept.sequence.length // page_tokens) for kept in self._idle.values())

    def cost(self, request: Request, siblings: Iterable[Request], num_pages: int) -> int | None:
        """Pages that `open` would take, of the free ones and the idle sessions', for so many.

        Returns:
            None if the request should wait: somebody is computing a prefix that it can share.
        """
        source = self._best_source(request, siblings)
        if source is None:
            return num_pages
        if not source.complete:
            return None
        full = source.length // self._engine.usage.page_tokens
        if isinstance(source.holder, Retained):  # its own pages are among the idle sessions'
            full = min(full, source.holder.sequence.shared_pages)
        return num_pages - full

    def open(self, request: Request, siblings: Iterable[Request], capacity: int) -> int | None:
        """Give a request its sequence, with as much computed prefix as can be had.

        Returns:
            Positions that were computed; None, and nothing done, if the request should wait:
            somebody is computing a prefix that it can share.

        Raises:
            Overloaded: not enough pages, even with every idle session evicted.
        """
        source = self._best_source(request, siblings)
        if source is not None and not source.complete:
            return None
        retained = self._take(request)
        kept = 0 if retained is None else _common(retained.tokens, request.tokens[:-1])
        if source is not None and source.length > kept:
            self._drop(retained)
            sequence, kept = self._begin_with(source, request, capacity)
        elif retained is not None:
            sequence = self._take_over(retained, kept, capacity)
        else:
            sequence = self._allocate(request, capacity)
        request.sequence = sequence
        self.enter(request)
        return kept

    def enter(self, request: Request) -> None:
        """Its KV is in the pool: others may begin with it."""
        self._prefixes.add(request, self._names_of(request))

    def leave(self, request: Request) -> None:
        """Nobody begins with its pages any more."""
        self._prefixes.discard(request)

    def close(self, request: Request, siblings: Iterable[Request]) -> None:
        """Take a finished request's sequence: retain it for its session, or free it."""
        sequence = self._withdraw(request)
        if sequence is None:
            return
        session = request.start.session
        siblings = [other for other in siblings if other.belongs_to(session) and other.retain]
        if session is None or not request.retain or siblings or not sequence.length:
            self._engine.free(sequence)
            return
        self._engine.truncate(sequence, sequence.length)
        self._engine.trim(sequence)
        self.forget(session)
        tokens = request.tokens[: sequence.length]
        retained = Retained(sequence, tokens, request.start.adapter, time.monotonic())
        self._idle[session.name] = retained
        self._prefixes.add(retained, self._names(request, tokens))

    def discard(self, request: Request) -> None:
        """Free a request's sequence and retain nothing."""
        sequence = self._withdraw(request)
        if sequence is not None:
            self._engine.free(sequence)

    def forget(self, session: SessionKey) -> None:
        """Free what a session retains, if anything."""
        self._drop(self._idle.pop(session.name, None))

    def expire(self) -> None:
        """Free sessions that have been idle for too long."""
        horizon = time.monotonic() - self._ttl_s
        while self._idle and next(iter(self._idle.values())).idle_since < horizon:
            self._evict("expired")

    def _evict(self, why: str, spared: Request | Retained | None = None) -> bool:
        """Free the session idle for longest, the spared one aside; False if there is none."""
        for key, retained in self._idle.items():
            if retained is not spared:
                del self._idle[key]
                self._drop(retained)
                self._evicted.labels(why).inc()
                return True
        return False

    def _best_source(self, request: Request, siblings: Iterable[Request]) -> Source | None:
        """Who has most of the request's prompt, among running siblings and its tenant's texts."""
        mine = [one for one in siblings if one is not request and _are_siblings(one, request)]
        found = [Source(one, self._common(one, request)) for one in mine]
        page_tokens = self._engine.usage.page_tokens
        names = self._names_of(request)[: (len(request.tokens) - 1) // page_tokens]
        holder, num_pages = self._prefixes.longest(names)
        if holder is not None:
            found.append(Source(holder, num_pages * page_tokens))
        return max(found, key=lambda source: source.promised, default=None)

    def _common(self, one: Request, request: Request) -> int:
        """Tokens that a sibling's text and a request's have in common, its last one aside: whole
        pages by their names, each of which stands for the text up to there, the rest one by one.
        """
        pairs = list(zip(self._names_of(one), self._names_of(request), strict=False))
        num_pages = bisect_left(pairs, True, key=lambda pair: pair[0] != pair[1])
        named = num_pages * self._engine.usage.page_tokens
        behind = _common(one.tokens[named:], request.tokens[named:])
        return min(named + behind, len(request.tokens) - 1)

    def _names_of(self, request: Request) -> Sequence[bytes]:
        """Of the beginnings that it could share, named once: it may ask at every step."""
        if request.prefix_names is None:
            request.prefix_names = self._names(request, request.tokens)
        return request.prefix_names

    def _names(self, request: Request, tokens: Sequence[int]) -> Sequence[bytes]:
        """Of a text's beginnings, as this request computes them; none without a tenant."""
        tenant, adapter = request.start.tenant, request.start.adapter
        if not tenant:
            return ()
        page_tokens = self._engine.usage.page_tokens
        return prefix_names(prefix_salt(tenant, adapter), tokens, page_tokens)

    def _allocate(self, request: Request, capacity: int) -> KVSequence:
        adapter = request.start.adapter
        return self.with_eviction(lambda: self._engine.allocate(capacity, adapter))

    def _begin_with(
        self, source: Source, request: Request, capacity: int
    ) -> tuple[KVSequence, int]:
        """A fork of the source, and its length; or an empty sequence for which even an idle source
        must go, since its own pages are those that lack.
        """
        sequence = source.holder.sequence
        assert sequence is not None
        try:
            forked = self.with_eviction(
                lambda: self._engine.fork(sequence, source.length, capacity), spared=source.holder
            )
        except Overloaded:
            if isinstance(source.holder, Request):
                raise
            return self._allocate(request, capacity), 0
        return forked, source.length

    def _withdraw(self, request: Request) -> KVSequence | None:
        """Take a request's sequence from it."""
        self.leave(request)
        sequence, request.sequence = request.sequence, None
        return sequence

    def _take(self, request: Request) -> Retained | None:
        """What the request's session retained, for it to go on with."""
        session = request.start.session
        retained = None if session is None else self._idle.pop(session.name, None)
        if retained is not None and retained.adapter != request.start.adapter:
            self._drop(retained)
            return None
        if retained is not None:
            self._prefixes.discard(retained)
        return retained

    def _drop(self, retained: Retained | None) -> None:
        if retained is not None:
            self._prefixes.discard(retained)
            self._engine.free(retained.sequence)

    def _take_over(self, retained: Retained, kept: int, capacity: int) -> KVSequence:
        sequence = retained.sequence
        self._engine.truncate(sequence, kept)
        try:
            self.with_eviction(lambda: self._engine.reserve(sequence, capacity))
        except Overloaded:
            self._engine.free(sequence)
            raise
        return sequence

    def with_eviction(
        self, reserve: Callable[[], T], spared: Request | Retained | None = None
    ) -> T:
        """Reserve pages, freeing idle sessions as long as there are too few.

        Raises:
            Overloaded: not even with every idle session evicted, the spared one aside.
        """
        while True:
            try:
                return reserve()
            except Overloaded:
                if not self._evict("pressure", spared):
                    raise


def _are_siblings(one: Request, other: Request) -> bool:
    """Whether they are of one session, and compute alike."""
    return one.belongs_to(other.start.session) and one.start.adapter == other.start.adapter


def _length(holder: Request | Retained) -> int:
    return 0 if holder.sequence is None else holder.sequence.length


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    length = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        length += 1
    return length
