"""Contenders side by side: interleaved runs, medians with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from treecast.errors import InvalidRequest

from .run import Contender, Prompts, Run


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
    """One contender over all prompts and rounds, so many prompts at once.

    Attributes:
        overall_tokens_per_s: all tokens by all seconds, so that long answers weigh more.
        same_tokens_as: by each other contender, prompts answered with the very same tokens.
        times_as_fast_as: by each other contender, tokens per second over its own, answer by answer.
    """

    contender: str
    at_once: int
    tokens_per_s: Spread
    overall_tokens_per_s: float
    step_ms: Spread | None
    tokens_per_step: Spread
    same_tokens_as: Mapping[str, int]
    times_as_fast_as: Mapping[str, Spread]
    num_prompts: int


def check_sizes(sizes: Sequence[int], num_prompts: int) -> None:
    """See that there are prompts enough to ask so many at once.

    Raises:
        InvalidRequest: there are not.
    """
    if max(sizes) > num_prompts:
        raise InvalidRequest(
            f"{max(sizes)} prompts at once need as many different ones; there are {num_prompts}"
        )


def in_groups(prompts: Prompts, at_once: int) -> list[Prompts]:
    """All prompts, so many in each group; the last one is filled up from the beginning."""
    names = [*prompts, *prompts]
    return [
        {name: prompts[name] for name in names[begin : begin + at_once]}
        for begin in range(0, len(prompts), at_once)
    ]


def interleave(
    contenders: Sequence[Contender],
    groups: Sequence[Prompts],
    max_tokens: int,
    rounds: int,
    progress: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Let all answer each group in turn, whoever begins rotating; nothing runs at the same time.

    Each contender answers the first group once beforehand, uncounted. A slow moment of the
    machine so falls on all of them alike. Those that answer one prompt at a time take no part in
    groups of several.
    """
    field = [one for one in contenders if one.batches or len(groups[0]) == 1]
    for contender in field:
        contender.answer(groups[0], max_tokens)
    runs = []
    for number in range(rounds):
        for place, group in enumerate(groups):
            shift = (number + place) % max(len(field), 1)
            for contender in (*field[shift:], *field[:shift]):
                runs.append(contender.answer(group, max_tokens))
                progress(runs[-1])
    return runs


def summarize(runs: Sequence[Run], contenders: Sequence[str]) -> list[Summary]:
    """By how many prompts were asked at once, one summary per contender, in the order given."""
    sizes = dict.fromkeys(len(run.answers) for run in runs)
    summaries = []
    for size in sizes:
        of_size = [run for run in runs if len(run.answers) == size]
        by_name = {
            name: mine
            for name in contenders
            if (mine := [run for run in of_size if run.contender == name])
        }
        summaries += [_summarize(name, size, by_name) for name in by_name]
    return summaries


def _summarize(name: str, at_once: int, by_name: Mapping[str, Sequence[Run]]) -> Summary:
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
        at_once=at_once,
        tokens_per_s=Spread.of([run.tokens_per_s for run in runs]),
        overall_tokens_per_s=sum(r.num_tokens for r in runs) / sum(r.seconds for r in runs),
        step_ms=Spread.of(step_ms) if step_ms else None,
        tokens_per_step=Spread.of([run.tokens_per_step for run in runs]),
        same_tokens_as=same,
        times_as_fast_as={other: Spread.of(each) for other, each in ratios.items()},
        num_prompts=len(mine),
    )


def _last_answers(runs: Sequence[Run]) -> dict[str, tuple[int, ...]]:
    return {answer.prompt_id: answer.token_ids for run in runs for answer in run.answers}
