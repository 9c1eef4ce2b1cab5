"""Timed answers, whoever gave them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from treecast.client import Client, Prompt, Result, SamplingParams
from treecast.sampling.params import SpeculationParams

Prompts = Mapping[str, Sequence[int]]
"""Token ids by the name of a prompt."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said to one prompt.

    Attributes:
        steps: passes of the LLM that gave tokens; the prefill's last one counts.
    """

    prompt_id: str
    token_ids: tuple[int, ...]
    steps: int


@dataclass(frozen=True, slots=True)
class Run:
    """What one contender needed for prompts that were asked at once.

    Attributes:
        seconds: from asking to the last token of all, prefill included.
        first_s: from asking to the first token of any.
    """

    contender: str
    answers: tuple[Answer, ...]
    seconds: float
    first_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers)

    @property
    def tokens_per_step(self) -> float:
        """Of one prompt, on average: prompts that share a pass count it each."""
        return self.num_tokens / sum(answer.steps for answer in self.answers)

    @property
    def step_ms(self) -> float | None:
        """Time of one step after the first, drafting included; None if there was but one.

        Of several prompts, steps are those of the one that took most.
        """
        steps = max(answer.steps for answer in self.answers)
        return 1e3 * (self.seconds - self.first_s) / (steps - 1) if steps > 1 else None


class Contender(Protocol):
    """Something that answers prompts, greedily."""

    @property
    def name(self) -> str: ...

    @property
    def batches(self) -> bool:
        """Whether it answers several prompts at once."""
        ...

    def answer(self, prompts: Prompts, max_tokens: int) -> Run:
        """Answer all prompts at once. Blocks."""


class MeshContender:
    """treecast through a router; trees of at most 0 nodes are plain decoding."""

    batches = True

    def __init__(self, name: str, client: Client, speculation: SpeculationParams) -> None:
        self.name = name
        self._client = client
        self._speculation = speculation

    def answer(self, prompts: Prompts, max_tokens: int) -> Run:
        def timed(prompt_ids: Sequence[int]) -> TimedResult:
            return time_answer(self._client, prompt_ids, max_tokens, self._speculation)

        begun = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            every = list(pool.map(timed, prompts.values()))
        seconds = time.perf_counter() - begun
        answers = tuple(
            Answer(prompt_id, one.result.token_ids, one.result.usage.steps)
            for prompt_id, one in zip(prompts, every, strict=True)
        )
        return Run(self.name, answers, seconds, min(one.first_s for one in every))


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
