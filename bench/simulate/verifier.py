"""A verifier as the time that its steps take: a batch, prompts in chunks, a pool of pages."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile

import simpy

from treecast.prefix import PAGE_TOKENS
from treecast.wire.frames import Heartbeat, Hello

from .scenario import Scenario


@dataclass(slots=True, eq=False)
class Serving:
    """A request at a verifier.

    Attributes:
        names: of the text's beginnings by whole pages, output included; see `treecast.prefix`.
        to_prefill: rows still to be computed before the next token; set when it is admitted.
        pages: in the pool, its own; `pinned` names those that it shares.
        left: output tokens still to come.
        came: called with how many tokens have come, at the end of a step.
    """

    names: Sequence[bytes]
    prompt_tokens: int
    output_tokens: int
    came: Callable[[int], None]
    to_prefill: int = 0
    cached_tokens: int = 0
    pages: int = 0
    pinned: list[bytes] = field(default_factory=list)
    left: int = 0
    credit: float = 0.0


class Pages:
    """The KV pool: pages of running requests, and those kept of texts that ended, by LRU.

    A text's pages are found by the chained names of its beginnings, so that a session's next turn
    and a tenant's common prompt are one mechanism, to whole pages. Pages that running requests
    share are pinned; `used` are those of one request alone.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._pins: Counter[bytes] = Counter()
        self._kept: OrderedDict[bytes, None] = OrderedDict()

    @property
    def free(self) -> int:
        return self.total - self.used - len(self._pins) - len(self._kept)

    def begin(self, serving: Serving) -> bool:
        """Take pages for a request, and find how much of its prompt is there; False: no room."""
        most = (serving.prompt_tokens - 1) // PAGE_TOKENS
        shared = list(takewhile(self._has, serving.names[:most]))
        whole = -(-(serving.prompt_tokens + serving.output_tokens + 1) // PAGE_TOKENS)
        own, idle = whole - len(shared), sum(name in self._kept for name in shared)
        if self.used + len(self._pins) + idle + own > self.total:
            return False
        self._pin(serving, shared)
        serving.pages, serving.cached_tokens = own, len(shared) * PAGE_TOKENS
        self.used += own
        self._evict()
        return True

    def computed(self, serving: Serving) -> None:
        """Others may begin with its prompt from now on."""
        names = serving.names[len(serving.pinned) : (serving.prompt_tokens - 1) // PAGE_TOKENS]
        new = [name for name in names if not self._has(name)]
        serving.pages -= len(new)
        self.used -= len(new)
        self._pin(serving, new)

    def end(self, serving: Serving) -> None:
        """Free its own pages; keep the whole pages of its text."""
        self.used -= serving.pages
        for name in serving.pinned:
            self._pins[name] -= 1
            if not self._pins[name]:
                del self._pins[name]
        for name in serving.names:
            if name not in self._pins:
                self._kept[name] = None
                self._kept.move_to_end(name)
        self._evict()

    def _has(self, name: bytes) -> bool:
        return name in self._pins or name in self._kept

    def _pin(self, serving: Serving, names: Sequence[bytes]) -> None:
        serving.pinned += names
        self._pins.update(names)
        for name in names:
            self._kept.pop(name, None)

    def _evict(self) -> None:
        while self.free < 0:
            self._kept.popitem(last=False)


class SimVerifier:
    """One verifier's process, from its start until it is lost.

    Attributes:
        busy_s: time spent in steps.
    """

    def __init__(self, env: simpy.Environment, scenario: Scenario, hello: Hello) -> None:
        self.hello = hello
        self.alive = True
        self.busy_s = 0.0
        self._env = env
        self._scenario = scenario
        self._step_s = cache(scenario.curve)
        self._pages = Pages(scenario.pool_tokens // PAGE_TOKENS)
        self._waiting: deque[Serving] = deque()
        self._running: list[Serving] = []
        self._wake = env.event()
        env.process(self._run())

    def start(self, serving: Serving) -> None:
        self._waiting.append(serving)
        if not self._wake.triggered:
            self._wake.succeed()

    def lose(self) -> None:
        """Its process is gone, and all that ran there; routers notice later."""
        self.alive = False
        self._running.clear()
        self._waiting.clear()

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(
            running=len(self._running),
            waiting=len(self._waiting),
            kv_pages_free=self._pages.free,
            kv_pages_total=self._pages.total,
        )

    def _run(self) -> Generator[simpy.Event, None, None]:
        while self.alive:
            self._admit()
            if not self._running:
                self._wake = self._env.event()
                yield self._wake
                continue
            rows, chunks = self._plan()
            step_s = self._step_s(rows)
            yield self._env.timeout(step_s)
            if self.alive:
                self.busy_s += step_s
                self._commit(chunks)

    def _admit(self) -> None:
        """Oldest first, as long as there are slots and pages."""
        while self._waiting and len(self._running) < self._scenario.slots:
            first = self._waiting[0]
            if not self._pages.begin(first):
                return
            first.to_prefill = first.prompt_tokens - first.cached_tokens
            first.left = first.output_tokens
            self._running.append(self._waiting.popleft())

    def _plan(self) -> tuple[int, dict[int, int]]:
        """Rows of the next step, and each prompt's part of them by id(), as the verifier divides.

        Every decoding request gets its root; prompts, oldest first, what is left, or half of it
        where trees wait for rows; trees the rest.
        """
        decoding = sum(not one.to_prefill for one in self._running)
        room = self._scenario.max_rows - decoding
        trees = min(self._scenario.nodes * decoding, room // 2)
        budget, chunks = room - trees, {}
        for one in self._running:
            if one.to_prefill and budget:
                chunks[id(one)] = min(one.to_prefill, budget)
                budget -= chunks[id(one)]
        left = room - sum(chunks.values())
        rows = decoding + sum(chunks.values()) + min(self._scenario.nodes * decoding, left)
        return rows, chunks

    def _commit(self, chunks: dict[int, int]) -> None:
        for one in list(self._running):
            if one.to_prefill:
                one.to_prefill -= chunks.get(id(one), 0)
                if one.to_prefill:
                    continue
                self._pages.computed(one)
                self._emit(one, 1)
            else:
                one.credit += self._scenario.tokens_per_step
                whole = int(one.credit)
                one.credit -= whole
                self._emit(one, whole)

    def _emit(self, one: Serving, num_tokens: int) -> None:
        num_tokens = min(num_tokens, one.left)
        one.left -= num_tokens
        if not one.left:
            self._running.remove(one)
            self._pages.end(one)
        if num_tokens:
            one.came(num_tokens)
