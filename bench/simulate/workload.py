"""Chat-like sessions: tenants with a system prompt, and tasks that tell their answers' lengths."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from treecast.prefix import PAGE_TOKENS, prefix_names

from .scenario import Scenario

VOCABULARY = 32_000
CONTEXT_TOKENS = 4096
MAX_TOKENS = 1024

_TASKS = ((16, 3), (40, 3), (150, 2), (500, 2))
"""Median output tokens, and of how many of a tenant's tasks."""

_SPREAD = 0.3
"""Of the logarithm of a length, about its task's."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request.

    Attributes:
        text: prompt and, behind it, the output that will come.
        names: of the text's beginnings by whole pages.
    """

    tenant: str
    session: str
    number: int
    text: Sequence[int]
    prompt_tokens: int
    names: Sequence[bytes]

    @property
    def prompt(self) -> Sequence[int]:
        return self.text[: self.prompt_tokens]

    @property
    def output_tokens(self) -> int:
        return len(self.text) - self.prompt_tokens


class Tenant:
    """A system prompt, and tasks: words that a user's turn begins with, and the median length."""

    def __init__(self, name: str, rng: np.random.Generator, system_tokens: int) -> None:
        self.name = name
        self.system = _words(rng, system_tokens)
        medians = [median for median, count in _TASKS for _ in range(count)]
        self.tasks = [(_words(rng, 16), median) for median in medians]


class Session:
    """A conversation: each turn's prompt is all that was said before, and a user's words."""

    def __init__(self, tenant: Tenant, name: str, rng: np.random.Generator, turns: int) -> None:
        self._tenant = tenant
        self._name = name
        self._rng = rng
        self._left = turns
        self._number = 0
        self._said = array("I", tenant.system)

    def turn(self) -> Turn | None:
        """The next one; None once it is over, or the context is full."""
        words, median = self._tenant.tasks[self._rng.integers(len(self._tenant.tasks))]
        asked = [*words, *_words(self._rng, int(self._rng.integers(4, 40)))]
        length = round(median * math.exp(_SPREAD * self._rng.standard_normal()))
        length = min(max(1, length), MAX_TOKENS)
        prompt_tokens = len(self._said) + len(asked)
        if not self._left or prompt_tokens + MAX_TOKENS > CONTEXT_TOKENS:
            return None
        self._left -= 1
        self._number += 1
        self._said.extend([*asked, *_words(self._rng, length)])
        text = array("I", self._said)
        names = prefix_names(self._tenant.name, text, PAGE_TOKENS)
        return Turn(self._tenant.name, self._name, self._number, text, prompt_tokens, names)


class Workload:
    """Sessions in the order in which they begin; the same for the same seed."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._rng = np.random.default_rng(scenario.seed)
        tokens = scenario.system_tokens
        self._tenants = [Tenant(f"tenant-{n}", self._rng, tokens) for n in range(scenario.tenants)]
        shares = 1 / np.arange(1, scenario.tenants + 1)
        self._shares = shares / shares.sum()
        self._begun = 0

    def gap_s(self) -> float:
        """Until the next session begins."""
        return float(self._rng.exponential(self._scenario.turns / self._scenario.requests_per_s))

    def session(self) -> Session:
        """Tenants by Zipf's law; as many turns as a geometric law says."""
        self._begun += 1
        tenant = self._tenants[self._rng.choice(len(self._tenants), p=self._shares)]
        turns = int(self._rng.geometric(1 / self._scenario.turns))
        rng = np.random.default_rng((self._scenario.seed, self._begun))
        return Session(tenant, f"session-{self._begun}", rng, turns)


def _words(rng: np.random.Generator, count: int) -> list[int]:
    words: list[int] = rng.integers(1, VOCABULARY, count).tolist()
    return words
