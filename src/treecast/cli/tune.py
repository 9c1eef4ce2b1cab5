"""`treecast tune`: train a draft on what its target writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treecast.errors import InvalidRequest

from . import options
from .output import stderr, stdout, write_json

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from treecast.tuning.settings import TuneProgress, TuneReport, TuneSettings


class Loss(StrEnum):
    """What a draft learns."""

    DISTILL = "distill"
    TOKENS = "tokens"


class Storage(StrEnum):
    """How trained weights are stored."""

    BFLOAT16 = "bfloat16"
    INT8 = "int8"


def register(app: typer.Typer) -> None:
    app.command()(tune)


def tune(
    out: Annotated[Path, typer.Argument(help="Folder for the draft.", show_default=False)],
    model: options.Model = "default",
    corpus: Annotated[
        Path | None,
        typer.Option(help="Self-played text, .jsonl or .jsonl.gz. Default: OUT/corpus.jsonl.gz."),
    ] = None,
    records: Annotated[
        int | None,
        typer.Option(min=1, help="Let the model write the corpus until it has this many records."),
    ] = None,
    user_temperatures: Annotated[
        str, typer.Option(metavar="1,0.8", help="Of the user turns it writes, batch by batch.")
    ] = "1",
    answer_temperatures: Annotated[
        str, typer.Option(metavar="0,1", help="Of its answers, batch by batch; 0 is greedy.")
    ] = "0",
    openings: Annotated[
        Path | None,
        typer.Option(
            help="A file of lines that the user turns begin with, record by record, for a corpus "
            "of certain kinds. Default: the model begins them itself.",
        ),
    ] = None,
    user_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of a user turn behind its opening.")
    ] = 48,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 192,
    drafts: Annotated[
        int,
        typer.Option(min=1, help="Train so many, each on what those before it miss."),
    ] = 1,
    minutes: Annotated[
        float,
        typer.Option(min=0.01, callback=options.finite, help="Minutes of training per draft."),
    ] = 25.0,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop earlier.")] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="0,29",
            help="The target's layers to start from; once for all drafts, or once for each. "
            "Default: first, last.",
        ),
    ] = None,
    head_rows: Annotated[
        int, typer.Option(min=0, help="Cut the head to the most frequent tokens; 0 keeps all.")
    ] = 0,
    start: Annotated[
        list[Path] | None,
        typer.Option(
            help="Trained weights to go on from (trained.safetensors); once for all drafts, or "
            "once for each."
        ),
    ] = None,
    loss: Annotated[
        Loss, typer.Option(help="Learn the model's probabilities, or its tokens alone.")
    ] = Loss.DISTILL,
    storage: Annotated[Storage, typer.Option(help="How weights are stored.")] = Storage.BFLOAT16,
    compare_single: Annotated[
        bool, typer.Option("--compare-single", help="Also train one draft of the same total size.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Folder for report.md and report.json. Default: OUT.")
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(callback=options.finite, help="Peak of AdamW's, with linear decay.")
    ] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Records in a batch.")] = 8,
    seed: Annotated[int, typer.Option(help="Of shuffling, split and self-play.")] = 0,
    threads: options.Threads = 2,
    as_json: options.Json = False,
) -> None:
    """Train drafts for a model, on text that the model itself writes.

    No data set is needed: with --records, the model first samples user turns and answers them.
    Interrupt it as you like; the same command goes on from the last checkpoint. One draft becomes
    the folder OUT; several, OUT/draft-1, OUT/draft-2 and so on.

    For example:

        treecast tune ./draft --records 2000 --minutes 30

        treecast tune ./draft --records 2000 --openings kinds.txt --user-tokens 200

        treecast tune ./draft --corpus selfplay.jsonl.gz --minutes 12

        treecast tune ./pair --corpus selfplay.jsonl.gz --drafts 2 --layers 0,29 --layers 29

        treecast up --draft ./draft

    With --json, progress comes as lines {"event": "progress", ...}, the last line is
    {"event": "result", ...}: each draft's held-out success with its first 1..5 guesses, and the
    union's.
    """
    from treecast.checkpoints import ensure_folder
    from treecast.tuning.settings import TuneSettings

    settings = TuneSettings(
        target=ensure_folder(model, progress=stderr().print),
        corpus=corpus or out / "corpus.jsonl.gz",
        out=out,
        minutes=minutes,
        max_steps=max_steps,
        drafts=drafts,
        layers=tuple(map(_parse_layers, layers or ())),
        head_rows=head_rows,
        start=tuple(start or ()),
        compare_single=compare_single,
        teacher_share=TuneSettings.teacher_share if loss is Loss.DISTILL else 0.0,
        storage=storage.value,
        report=report,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
    )
    corpus_plan = CorpusPlan(
        records,
        _parse_temperatures("--user-temperatures", user_temperatures, lowest=0.01),
        _parse_temperatures("--answer-temperatures", answer_temperatures, lowest=0.0),
        _read_openings(openings),
        user_tokens,
        answer_tokens,
    )
    run = _run_json if as_json else _run_with_progress
    run(settings, corpus_plan, threads)


@dataclass(frozen=True)
class CorpusPlan:
    """How many records the target is to write (None: none), of what, how long and how freely."""

    records: int | None
    user_temperatures: tuple[float, ...]
    answer_temperatures: tuple[float, ...]
    openings: tuple[str, ...]
    user_tokens: int
    answer_tokens: int


def _parse_layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidRequest(f"--layers is {text!r}; it must be like 0,29") from None


def _parse_temperatures(option: str, text: str, lowest: float) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InvalidRequest(f"{option} is {text!r}; it must be like 1,0.8") from None
    for value in values:
        if not lowest <= value <= 10.0:
            raise InvalidRequest(f"{option} has {value}; allowed: {lowest} to 10")
    return values


def _read_openings(path: Path | None) -> tuple[str, ...]:
    """A file's lines that are not empty; the one empty opening where there is no file."""
    if path is None:
        return ("",)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--openings {path} cannot be read: {error}") from None
    if not (openings := tuple(line.strip() for line in lines if line.strip())):
        raise InvalidRequest(f"--openings {path} holds no line")
    return openings


def _run_json(settings: TuneSettings, corpus: CorpusPlan, threads: int) -> None:
    write_corpus(
        settings, corpus, threads, lambda done, of: write_json({"event": "corpus", "done": done})
    )
    report = train(settings, threads, lambda now: write_json({"event": "progress", **_fields(now)}))
    write_json({"event": "result", **_fields(report)})


def _run_with_progress(settings: TuneSettings, corpus: CorpusPlan, threads: int) -> None:
    with _progress() as progress:
        if corpus.records is not None:
            writing = progress.add_task("writing corpus", total=corpus.records)
            write_corpus(
                settings, corpus, threads, lambda done, of: progress.update(writing, completed=done)
            )
        bars: dict[str, TaskID] = {}

        def show(now: TuneProgress) -> None:
            if now.draft not in bars:
                share = settings.drafts if now.draft == "single" else 1
                bars[now.draft] = progress.add_task(now.draft, total=settings.minutes * 60 * share)
            progress.update(bars[now.draft], completed=now.elapsed_s, description=_describe(now))

        report = train(settings, threads, show)
    _print_report(report)


def write_corpus(
    settings: TuneSettings,
    plan: CorpusPlan,
    threads: int,
    progress: Callable[[int, int], None],
) -> None:
    """Let the target write until the corpus has `plan.records`; nothing to do for None."""
    if plan.records is None:
        return
    import torch

    from treecast.tuning.boost import check
    from treecast.tuning.selfplay import SelfPlaySettings, generate_corpus

    check(settings)
    torch.set_num_threads(threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    generate_corpus(
        SelfPlaySettings(
            settings.target,
            settings.corpus,
            plan.records,
            user_temperatures=plan.user_temperatures,
            answer_temperatures=plan.answer_temperatures,
            openings=plan.openings,
            max_user_tokens=plan.user_tokens,
            max_answer_tokens=plan.answer_tokens,
            top_k=settings.teacher_top_k if settings.teacher_share else 0,
            seed=settings.seed,
        ),
        progress,
    )


def train(
    settings: TuneSettings, threads: int, progress: Callable[[TuneProgress], None]
) -> TuneReport:
    """Train with the given number of threads."""
    import torch

    from treecast.tuning.boost import tune as train_draft

    torch.set_num_threads(threads)
    return train_draft(settings, progress)


def _progress() -> Progress:
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    text = TextColumn("[progress.description]{task.description}")
    return Progress(text, BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=stderr())


def _describe(now: TuneProgress) -> str:
    text = f"{now.draft}, step {now.num_steps}, loss {now.loss:.3f}"
    if now.heldout_success:
        text += f", held-out top-1 {now.heldout_success[0]:.3f}"
    return text


def _fields(record: TuneProgress | TuneReport) -> dict[str, object]:
    import json
    from dataclasses import asdict

    fields: dict[str, object] = json.loads(json.dumps(asdict(record), default=str))
    return fields


def _print_report(report: TuneReport) -> None:
    console = stdout()
    for problem in report.corpus_problems[:5]:
        stderr().print(f"warning: {problem}", style="yellow")
    for draft in report.drafts:
        console.print(f"{draft.name}: {_shares(draft.heldout_success)}, {draft.num_steps} steps")
    if len(report.drafts) > 1:
        console.print(f"union: {_shares(report.union_success)}")
    if report.single:
        console.print(f"one draft of the same size: {_shares(report.single.heldout_success)}")
    console.print(
        f"(held-out success of the first 1..5 guesses; {report.num_records} records)\n"
        f"report: {report.report}",
        soft_wrap=True,
    )
    folder = report.drafts[0].out
    console.print(f"serve it with: treecast up --draft {folder}", soft_wrap=True)


def _shares(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
