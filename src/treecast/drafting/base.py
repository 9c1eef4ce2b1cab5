"""The contract of everything that guesses: drafters keep their own state per session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from treecast.sampling.params import SamplingParams
from treecast.tree import TokenTree


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """What a drafter is told of a session when it opens.

    Attributes:
        tokens: all committed text, prompt first.
        prompt_len: how many of them are the prompt.
        noise_key: the target's own noise key, for coupled proposals.
    """

    tokens: Sequence[int]
    prompt_len: int
    sampling: SamplingParams
    noise_key: int


class Drafter(Protocol):
    """Grows one evergreen tree per session. Not thread-safe; calls may block on computation."""

    @property
    def name(self) -> str:
        """Proposer name for statistics, such as "ssm" or "ngram"."""

    @property
    def vocab_size(self) -> int:
        """Tokens it can propose are below this; 0 for a drafter that only repeats what it saw."""

    def open(self, handle: int, request: DraftRequest) -> None:
        """Begin a session. Raises Overloaded when it has no room."""

    def commit(self, handle: int, tokens: Sequence[int]) -> None:
        """The target committed tokens: re-root on a hit, start anew on a miss."""

    def draft(self, budgets: dict[int, int]) -> dict[int, TokenTree]:
        """Grow trees of up to the budgeted nodes, by handle, batched over sessions."""

    def close(self, handle: int) -> None:
        """End a session and free what it held; unknown handles are ignored."""
