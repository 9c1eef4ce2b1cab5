"""The page itself: what the template is given, and how it is made self-contained."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2

from treecast.client.results import Result, RoundReport

from .drawing import Drawing, draw, fate
from .lettering import label, percent, running_text
from .people import Cast, Proposer
from .summary import summarise
from .timeline import Lane, Timeline

_MAX_HEAT = 5


@dataclass(frozen=True, slots=True)
class Row:
    """A node in words, for the table below its tree."""

    number: int
    text: str
    parent: str
    percent: str
    proposers: tuple[Proposer, ...]
    fate: str


@dataclass(frozen=True, slots=True)
class RoundView:
    """One round as the template shows it; `number` counts from 1.

    Attributes:
        text: its part of the output.
        heat: 0 to 5, by the number of tokens that it brought.
        left_over: whether part of the tree is what an earlier round left over.
    """

    number: int
    text: str
    num_tokens: int
    num_accepted: int
    num_nodes: int
    heat: int
    drawing: Drawing
    rows: tuple[Row, ...]
    lanes: Sequence[Lane]
    took_ms: float
    prompt_tokens: int
    left_over: bool


def render_page(prompt: str, result: Result, facts: Mapping[str, str]) -> str:
    """One self-contained HTML document about the first sample of a generation.

    Args:
        prompt: as the user gave it.
        result: with rounds; see `report_rounds`.
        facts: further lines for the head, such as sampling settings.
    """
    reports = result.rounds
    rounds = [report.round for report in reports]
    cast = Cast(rounds)
    timeline = Timeline(rounds, cast)
    script = _file("page.js")
    return _template().render(
        prompt=running_text(prompt),
        result=result,
        facts=facts,
        rounds=_views(result, cast, timeline),
        summary=summarise(rounds, cast),
        cast=cast,
        lanes=timeline.whole(),
        ticks=timeline.ticks(),
        total_ms=timeline.total_us / 1000,
        complete=len(rounds) == result.usage.steps,
        style=_file("page.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _views(result: Result, cast: Cast, timeline: Timeline) -> list[RoundView]:
    views: list[RoundView] = []
    before = "prompt"
    texts = _segments(result)
    for number, (report, text) in enumerate(zip(result.rounds, texts, strict=True), start=1):
        views.append(_view(number, report, text, before, cast, timeline))
        before = label(report.bonus_text, report.round.bonus)
    return views


def _segments(result: Result) -> list[str]:
    """Each round's part of the text; the last has what was held back. Token ids without text."""
    reports = result.rounds
    if not result.text:
        return ["".join(f"{token} " for token in report.round.tokens) for report in reports]
    texts = [report.text for report in reports]
    told = sum(len(text) for text in texts)
    complete = len(reports) == result.usage.steps
    if texts and complete:
        texts[-1] += result.text[told:]
    return [running_text(text) for text in texts]


def _view(
    number: int, report: RoundReport, text: str, before: str, cast: Cast, timeline: Timeline
) -> RoundView:
    one = report.round
    began, end = timeline.spans[number - 1]
    return RoundView(
        number=number,
        text=text,
        num_tokens=len(one.tokens),
        num_accepted=len(one.accepted),
        num_nodes=len(one.tree),
        heat=min(_MAX_HEAT, len(one.accepted)),
        drawing=draw(report, before, cast),
        rows=_rows(report, cast),
        lanes=timeline.of_round(number),
        took_ms=(end - began) / 1000,
        prompt_tokens=one.prompt_tokens,
        left_over=any(draft.came_us < one.began_us for draft in one.drafts),
    )


def _rows(report: RoundReport, cast: Cast) -> tuple[Row, ...]:
    one, tree = report.round, report.round.tree
    texts = report.node_texts or ("",) * len(tree)
    return tuple(
        Row(
            node + 1,
            label(texts[node], token),
            "start" if tree.parents[node] < 0 else str(tree.parents[node] + 1),
            percent(tree.confidence[node]),
            tuple(cast.of_node(one, node)),
            fate(report, node),
        )
        for node, token in enumerate(tree.tokens)
    )


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_file("page.html.j2"))
