"""One timed answer, whoever gave it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from treecast.client import Client, Prompt, Result, SamplingParams
from treecast.sampling.params import SpeculationParams


@dataclass(frozen=True, slots=True)
class Run:
    """What one contender needed for one prompt.

    Attributes:
        seconds: from asking to the last token, prefill included.
        first_s: from asking to the first token.
        steps: passes of the LLM that gave tokens; the prefill's last one counts.
    """

    contender: str
    prompt_id: str
    token_ids: tuple[int, ...]
    steps: int
    seconds: float
    first_s: float

    @property
    def tokens_per_s(self) -> float:
        return len(self.token_ids) / self.seconds

    @property
    def tokens_per_step(self) -> float:
        return len(self.token_ids) / self.steps

    @property
    def step_ms(self) -> float | None:
        """Time of one step after the first, drafting included; None if there was but one."""
        return 1e3 * (self.seconds - self.first_s) / (self.steps - 1) if self.steps > 1 else None


class Contender(Protocol):
    """Something that answers prompts, greedily, one at a time."""

    @property
    def name(self) -> str: ...

    def answer(self, prompt_id: str, prompt_ids: Sequence[int], max_tokens: int) -> Run:
        """Answer one prompt. Blocks."""


class MeshContender:
    """treecast through a router; trees of at most 0 nodes are plain decoding."""

    def __init__(self, name: str, client: Client, speculation: SpeculationParams) -> None:
        self.name = name
        self._client = client
        self._speculation = speculation

    def answer(self, prompt_id: str, prompt_ids: Sequence[int], max_tokens: int) -> Run:
        timed = time_answer(self._client, prompt_ids, max_tokens, self._speculation)
        result = timed.result
        return Run(
            self.name, prompt_id, result.token_ids, result.usage.steps, timed.seconds, timed.first_s
        )


@dataclass(frozen=True, slots=True)
class TimedResult:
    """A result of the mesh and how long it took."""

    result: Result
    seconds: float
    first_s: float


def time_answer(
    client: Client,
    prompt: Prompt,
    max_tokens: int,
    speculation: SpeculationParams,
    show: Callable[[str], None] = lambda text: None,
) -> TimedResult:
    """Answer a prompt greedily, showing the text as it comes."""
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    begun = time.perf_counter()
    first_s = None
    stream = client.generate(
        prompt,
        sampling,
        max_nodes=speculation.max_nodes,
        law=speculation.law,
        proposal=speculation.proposal,
        growth=speculation.growth,
    )
    with stream:
        for chunk in stream:
            if first_s is None:
                first_s = time.perf_counter() - begun
            show(chunk.text)
        seconds = time.perf_counter() - begun
        return TimedResult(stream.result(), seconds, first_s or seconds)
