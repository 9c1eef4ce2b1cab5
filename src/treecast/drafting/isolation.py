"""Work on a batch of sessions, of which one may fail: the others get theirs done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Done = TypeVar("Done")


@dataclass(frozen=True, slots=True)
class Turn(Generic[Done]):
    """What came of a batch: results and failures, by session."""

    done: Mapping[int, Done]
    failures: Mapping[int, Exception]


def each_alone(
    budgets: dict[int, int], work: Callable[[dict[int, int]], dict[int, Done]]
) -> Turn[Done]:
    """Work on all sessions at once; if that fails, on each by itself, to find which it was.

    `work` may be repeated for a session that it did not fail at.
    """
    try:
        return Turn(work(budgets), {})
    except Exception as error:
        if len(budgets) > 1:
            turns = [each_alone({handle: budget}, work) for handle, budget in budgets.items()]
            done = {handle: result for turn in turns for handle, result in turn.done.items()}
            failures = {handle: why for turn in turns for handle, why in turn.failures.items()}
            return Turn(done, failures)
        return Turn({}, dict.fromkeys(budgets, error))
