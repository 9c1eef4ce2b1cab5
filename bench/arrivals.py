"""Open-loop load: requests arrive when they were planned to, however busy the mesh is.

A closed loop sends the next request when the last has ended, so a slow server is asked less and its
queue never shows. Here the arrivals are drawn beforehand, and every latency counts from a request's
planned arrival: what it waited in any queue, ours included, is in it (Schroeder et al., NSDI 2006,
"Open Versus Closed"; Tene's "coordinated omission").
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from treecast.client import Prompt
from treecast.client.aio import AsyncClient
from treecast.errors import InvalidRequest, TreecastError
from treecast.sampling.params import SamplingParams, SpeculationParams

PERCENTILES = (50, 90, 95, 99)
MOST_ARRIVALS = 100_000
"""Of one load; all of them are planned, and answered, in one process."""


@dataclass(frozen=True, slots=True)
class Poisson:
    """Arrivals independent of one another, so many a second on average."""

    rate_per_s: float

    @classmethod
    def parse(cls, text: str) -> Poisson:
        """Of `poisson:RATE`.

        Raises:
            InvalidRequest: another kind, or a rate that is not above 0.
        """
        kind, _, rate = text.partition(":")
        try:
            parsed = float(rate) if kind == "poisson" else 0.0
        except ValueError:
            parsed = 0.0
        if not 0 < parsed < float("inf"):
            raise InvalidRequest(f"--arrivals is {text!r}; poisson:RATE, RATE above 0 per second")
        return cls(parsed)

    def plan(self, seconds: float, seed: int) -> list[float]:
        """Seconds from the beginning, ascending; the same for the same seed.

        Raises:
            InvalidRequest: there would be too many.
        """
        if not (expected := self.rate_per_s * seconds) <= MOST_ARRIVALS:
            raise InvalidRequest(
                f"{self.rate_per_s:g} requests a second for {seconds:g} s are {expected:g}; "
                f"the limit is {MOST_ARRIVALS}"
            )
        random = np.random.default_rng(seed)
        planned, at = [], float(random.exponential(1 / self.rate_per_s))
        while at < seconds:
            planned.append(at)
            at += float(random.exponential(1 / self.rate_per_s))
        return planned


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request; seconds from the beginning of the load.

    Attributes:
        sent_s: when we called; later than planned if our own loop was busy.
        first_s: of the first token; None if none came.
        error: why it failed; empty if it did not.
    """

    planned_s: float
    sent_s: float
    first_s: float | None
    ended_s: float
    num_tokens: int
    error: str = ""


async def offer(
    router: str,
    prompts: Sequence[Prompt],
    planned: Sequence[float],
    max_tokens: int,
    speculation: SpeculationParams,
) -> list[Answer]:
    """Send a prompt at each planned second, in turns, and wait for all answers."""
    async with AsyncClient(router) as client:
        began = time.perf_counter()

        async def answer(number: int, planned_s: float) -> Answer:
            await asyncio.sleep(max(0.0, began + planned_s - time.perf_counter()))
            return await _answer(
                client, prompts[number % len(prompts)], planned_s, began, max_tokens, speculation
            )

        return await asyncio.gather(*(answer(i, at) for i, at in enumerate(planned)))


async def _answer(
    client: AsyncClient,
    prompt: Prompt,
    planned_s: float,
    began: float,
    max_tokens: int,
    speculation: SpeculationParams,
) -> Answer:
    def now() -> float:
        return time.perf_counter() - began

    sent, first, tokens = now(), None, 0
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    try:
        stream = client.generate(
            prompt,
            sampling,
            max_nodes=speculation.max_nodes,
            law=speculation.law,
            proposal=speculation.proposal,
            growth=speculation.growth,
        )
        async for chunk in stream:
            first = now() if first is None else first
            tokens += len(chunk.token_ids)
    except TreecastError as error:
        return Answer(planned_s, sent, first, now(), tokens, f"{error.reason}: {error.message}")
    return Answer(planned_s, sent, first, now(), tokens)


@dataclass(frozen=True, slots=True)
class Load:
    """One level of batching under a load.

    Attributes:
        level: requests in one step at most.
        answers: of all requests, failed ones too.
    """

    level: int
    answers: Sequence[Answer]

    def summary(self) -> LoadSummary:
        """Percentiles over the requests that were answered; how many were not."""
        done = [one for one in self.answers if not one.error and one.first_s is not None]
        firsts = [one.first_s - one.planned_s for one in done if one.first_s is not None]
        per_token = [
            (one.ended_s - one.first_s) / (one.num_tokens - 1)
            for one in done
            if one.first_s is not None and one.num_tokens > 1
        ]
        seconds = max((one.ended_s for one in self.answers), default=0.0)
        return LoadSummary(
            level=self.level,
            offered=len(self.answers),
            failed=len(self.answers) - len(done),
            tokens_per_s=sum(one.num_tokens for one in done) / seconds if seconds else 0.0,
            first_token_ms=percentiles_ms(firsts),
            latency_ms=percentiles_ms([one.ended_s - one.planned_s for one in done]),
            per_token_ms=percentiles_ms(per_token),
            sent_late_ms=percentiles_ms([one.sent_s - one.planned_s for one in self.answers]),
        )


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """A level in figures; milliseconds by percentile, empty where nothing was answered.

    Attributes:
        first_token_ms, latency_ms: from the planned arrival to the first and the last token.
        per_token_ms: between tokens, after the first.
        sent_late_ms: how late we were ourselves; it is in the latencies.
    """

    level: int
    offered: int
    failed: int
    tokens_per_s: float
    first_token_ms: Mapping[int, float]
    latency_ms: Mapping[int, float]
    per_token_ms: Mapping[int, float]
    sent_late_ms: Mapping[int, float]


def percentiles_ms(seconds: Sequence[float]) -> dict[int, float]:
    """By percentile, linearly interpolated."""
    if not seconds:
        return {}
    found = np.percentile(seconds, PERCENTILES)
    return {
        percentile: 1000 * float(value)
        for percentile, value in zip(PERCENTILES, found, strict=True)
    }
