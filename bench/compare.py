"""Contenders side by side: interleaved runs, medians with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .run import Contender, Run


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of a figure over the runs that have it."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles by linear interpolation; all equal for one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)


@dataclass(frozen=True, slots=True)
class Summary:
    """One contender over all prompts and rounds.

    Attributes:
        overall_tokens_per_s: all tokens by all seconds, so that long answers weigh more.
        same_tokens_as: by each other contender, prompts answered with the very same tokens.
        times_as_fast_as: by each other contender, tokens per second over its own, answer by answer.
    """

    contender: str
    tokens_per_s: Spread
    overall_tokens_per_s: float
    step_ms: Spread | None
    tokens_per_step: Spread
    same_tokens_as: Mapping[str, int]
    times_as_fast_as: Mapping[str, Spread]
    num_prompts: int


def interleave(
    contenders: Sequence[Contender],
    prompts: Mapping[str, Sequence[int]],
    max_tokens: int,
    rounds: int,
    progress: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Let all answer each prompt in turn, whoever begins rotating; nothing runs at the same time.

    Each contender answers the first prompt once beforehand, uncounted. A slow moment of the
    machine so falls on all of them alike.
    """
    first_id, first_ids = next(iter(prompts.items()))
    for contender in contenders:
        contender.answer(first_id, first_ids, max_tokens)
    runs = []
    for number in range(rounds):
        for place, (prompt_id, prompt_ids) in enumerate(prompts.items()):
            shift = (number + place) % len(contenders)
            for contender in (*contenders[shift:], *contenders[:shift]):
                runs.append(contender.answer(prompt_id, prompt_ids, max_tokens))
                progress(runs[-1])
    return runs


def summarize(runs: Sequence[Run], contenders: Sequence[str]) -> list[Summary]:
    """One summary per contender, in the order given."""
    by_name = {name: [run for run in runs if run.contender == name] for name in contenders}
    return [_summarize(name, by_name) for name in contenders]


def _summarize(name: str, by_name: Mapping[str, Sequence[Run]]) -> Summary:
    runs = by_name[name]
    mine = _last_answers(runs)
    others = {other: theirs for other, theirs in by_name.items() if other != name}
    same = {
        other: sum(_last_answers(theirs)[prompt_id] == mine[prompt_id] for prompt_id in mine)
        for other, theirs in others.items()
    }
    ratios = {
        other: [
            ours.tokens_per_s / each.tokens_per_s for ours, each in zip(runs, theirs, strict=True)
        ]
        for other, theirs in others.items()
    }
    step_ms = [run.step_ms for run in runs if run.step_ms is not None]
    return Summary(
        contender=name,
        tokens_per_s=Spread.of([run.tokens_per_s for run in runs]),
        overall_tokens_per_s=sum(len(r.token_ids) for r in runs) / sum(r.seconds for r in runs),
        step_ms=Spread.of(step_ms) if step_ms else None,
        tokens_per_step=Spread.of([run.tokens_per_step for run in runs]),
        same_tokens_as=same,
        times_as_fast_as={other: Spread.of(each) for other, each in ratios.items()},
        num_prompts=len(mine),
    )


def _last_answers(runs: Sequence[Run]) -> dict[str, tuple[int, ...]]:
    return {run.prompt_id: run.token_ids for run in runs}
