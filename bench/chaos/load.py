"""Streams from the SDK, on and on, each compared token by token with what it should be."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Self

from treecast.client import AsyncClient, Prompt, Result, SamplingParams
from treecast.errors import TreecastError

from .mesh import ChaosMesh

LOST_S = 60.0
"""A stream that takes so long counts as lost."""


class Outcome(Enum):
    SAME = "same"
    CHANGED = "changed"
    LOST = "lost"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Work:
    """One request of the set that is asked again and again."""

    name: str
    prompt: Prompt
    sampling: SamplingParams


@dataclass(slots=True)
class Record:
    """One stream. Times are the monotonic clock's.

    Attributes:
        pause_s: the longest time without a token: to the first one, or between two.
        why: the error's message; empty without one.
    """

    work: str
    began_s: float
    ended_s: float | None = None
    pause_s: float = 0.0
    resumes: int = 0
    outcome: Outcome | None = None
    why: str = ""

    def overlaps(self, begin_s: float, end_s: float) -> bool:
        return self.began_s <= end_s and (self.ended_s is None or self.ended_s >= begin_s)


class Load:
    """Workers that stream without a break; an async context manager.

    Attributes:
        records: every stream begun, in order.
    """

    def __init__(
        self,
        mesh: ChaosMesh,
        works: Sequence[Work],
        expected: dict[str, tuple[int, ...]],
        num_workers: int,
    ) -> None:
        """Every other worker begins at another router, and every other one has a session."""
        self.records: list[Record] = []
        self.counts: Counter[Outcome] = Counter()
        self._works = itertools.cycle(works)
        self._expected = expected
        self._num_workers = num_workers
        routers = mesh.router_addresses
        self._clients = [mesh.client(routers), mesh.client([*routers[1:], *routers[:1]])]
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._ended = asyncio.Event()

    @property
    def in_flight(self) -> int:
        return sum(record.ended_s is None for record in self.records)

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._work(at)) for at in range(self._num_workers)]
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Let running streams end, close the sessions and the connections."""
        self._stopping = True
        try:
            await asyncio.gather(*self._tasks)
            for at in range(1, self._num_workers, 2):
                await self._clients[0].close_session(f"chaos-{at}")
        finally:
            for task in self._tasks:
                task.cancel()
            for client in self._clients:
                await client.aclose()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until `holds()`, looked at whenever a stream ends."""
        while not holds():
            self._ended.clear()
            await self._ended.wait()

    async def settle(self, end_s: float) -> None:
        """Until all streams that began by then have ended."""
        await self.until(lambda: not any(r.ended_s is None for r in self._begun_by(end_s)))

    def _begun_by(self, end_s: float) -> list[Record]:
        return [record for record in self.records if record.began_s <= end_s]

    async def _work(self, number: int) -> None:
        client = self._clients[number // 2 % len(self._clients)]
        session = f"chaos-{number}" if number % 2 else None
        while not self._stopping:
            record = await self._stream(client, next(self._works), session)
            if record.outcome is Outcome.ERROR:
                await asyncio.sleep(0.1)  # a client that is refused does not come back at once

    async def _stream(self, client: AsyncClient, work: Work, session: str | None) -> Record:
        record = Record(work.name, time.monotonic())
        self.records.append(record)
        try:
            async with asyncio.timeout(LOST_S):
                result = await follow(client, work, record, session)
            same = result.token_ids == self._expected[work.name]
            record.outcome = Outcome.SAME if same else Outcome.CHANGED
            record.resumes = result.resumes
        except TimeoutError:
            record.outcome = Outcome.LOST
        except TreecastError as error:
            record.outcome, record.why = Outcome.ERROR, f"{error.reason}: {error.message}"
        record.ended_s = time.monotonic()
        self.counts[record.outcome] += 1
        self._ended.set()
        return record


async def follow(
    client: AsyncClient, work: Work, record: Record, session: str | None = None
) -> Result:
    """Read a stream to its end and note its longest pause.

    Raises:
        TreecastError: it ended with an error.
    """
    last_s = time.monotonic()
    stream = client.generate(work.prompt, work.sampling, session_id=session)
    async with stream:
        async for _ in stream:
            now_s = time.monotonic()
            record.pause_s, last_s = max(record.pause_s, now_s - last_s), now_s
        return await stream.result()


async def undisturbed(mesh: ChaosMesh, works: Sequence[Work]) -> dict[str, tuple[int, ...]]:
    """Every work's tokens without a fault, decoded plainly."""
    async with mesh.client() as client:
        streams = [client.generate(one.prompt, one.sampling, max_nodes=0) for one in works]
        results = await asyncio.gather(*(stream.result() for stream in streams))
    return {work.name: result.token_ids for work, result in zip(works, results, strict=True)}


def toy_works(num_works: int, num_tokens: int) -> list[Work]:
    """Greedy and sampled in turn; prompts of the toy's vocabulary."""
    return [
        Work(
            f"toy-{at}",
            [at % 97, (at * 7 + 3) % 97, 5, 6, 5, 6],
            SamplingParams(
                temperature=0.8 * (at % 2), seed=at, max_tokens=num_tokens, ignore_eos=True
            ),
        )
        for at in range(num_works)
    ]
