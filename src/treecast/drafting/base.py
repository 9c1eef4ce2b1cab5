"""The contract of everything that guesses: drafters keep their own state per session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from treecast.sampling.grammar import Matcher
from treecast.sampling.params import SamplingParams, SpeculationParams
from treecast.tree import TokenTree


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """What a drafter is told of a session when it opens.

    Attributes:
        tokens: all committed text, prompt first.
        prompt_len: how many of them are the prompt.
        noise_key: the target's own noise key, for coupled proposals.
        grammar: at the output's beginning, where one is to be kept; drafters copy it.
        draft_key: of the drafter's own draws; no two drafters of a session share one.
    """

    tokens: Sequence[int]
    prompt_len: int
    sampling: SamplingParams
    noise_key: int
    speculation: SpeculationParams = SpeculationParams()  # noqa: RUF009  frozen
    draft_key: int = 0
    grammar: Matcher | None = None


class Drafter(Protocol):
    """Grows one evergreen tree per session. Not thread-safe; calls may block on computation.

    A session that `open` took never runs out of memory later. What `open` or `commit` refuse
    leaves the drafter as it was, but for that session, which the caller then closes.
    """

    @property
    def name(self) -> str:
        """Proposer name for statistics, such as "ssm" or "ngram"."""

    @property
    def vocab_size(self) -> int:
        """Tokens it can propose are below this; 0 for a drafter that only repeats what it saw."""

    def open(self, handle: int, request: DraftRequest) -> None:
        """Begin a session.

        Raises:
            Overloaded: no room for it.
            InvalidRequest: a text that it cannot draft for.
        """

    def commit(self, handle: int, tokens: Sequence[int]) -> None:
        """The target committed tokens: re-root on a hit, start anew on a miss.

        Raises:
            InvalidRequest: a token that the drafter does not have.
        """

    def draft(self, budgets: dict[int, int], tokens_per_s: float = 0.0) -> dict[int, TokenTree]:
        """Grow trees of up to the budgeted nodes (1 or more), by handle, batched over sessions.

        What is computed for a tree should add as many tokens as its time is worth, at
        `tokens_per_s` for all these sessions together; 0 leaves time free.

        Proposer bit 0 is set throughout. An empty tree says that nothing can be proposed. A
        session missing from the result has committed text left to compute: call again.
        """

    def close(self, handle: int) -> None:
        """End a session and free what it held; unknown handles are ignored."""


@runtime_checkable
class ModelDrafter(Protocol):
    """What a drafter that computes has beside: it reads long prompts in parts, and runs ahead."""

    def is_behind(self, handle: int) -> bool:
        """Whether committed text is left to compute: drafting again gives a better tree."""

    def run_ahead(self, budgets: dict[int, int]) -> set[int]:
        """Compute a little more of trees of these sizes, beyond what was offered.

        Returns:
            Sessions that have more to compute.
        """

    def foresaw(self, handle: int) -> bool:
        """Whether the committed text's last token was computed before it was committed."""
