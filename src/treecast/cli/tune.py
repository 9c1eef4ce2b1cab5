"""`treecast tune`: train a draft on what its target writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treecast.errors import InvalidRequest

from . import options
from .output import stderr, stdout, write_json

if TYPE_CHECKING:
    from rich.progress import Progress

    from treecast.tuning.settings import TuneProgress, TuneReport, TuneSettings


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
    minutes: Annotated[float, typer.Option(min=0.01, help="Minutes of training.")] = 25.0,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop earlier.")] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="0,29", help="The target's layers to start from. Default: first, last."
        ),
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(help="Peak of AdamW's, with linear decay.")
    ] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Records in a batch.")] = 8,
    seed: Annotated[int, typer.Option(help="Of shuffling, split and self-play.")] = 0,
    threads: options.Threads = 2,
    as_json: options.Json = False,
) -> None:
    """Train a draft for a model, on text that the model itself writes.

    No data set is needed: with --records, the model first samples user turns and answers them.
    Interrupt it as you like; the same command goes on from the last checkpoint.

    For example:

        treecast tune ./draft --records 2000 --minutes 30

        treecast tune ./draft --corpus selfplay.jsonl.gz --minutes 12

        treecast up --draft ./draft

    With --json, progress comes as lines {"event": "progress", ...}, the last line is
    {"event": "result", ...} with the held-out success of the draft's first 1..5 guesses.
    """
    from treecast.tuning.settings import TuneSettings

    settings = TuneSettings(
        target=_target_folder(model),
        corpus=corpus or out / "corpus.jsonl.gz",
        out=out,
        minutes=minutes,
        max_steps=max_steps,
        layers=_parse_layers(layers),
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
    )
    run = _run_json if as_json else _run_with_progress
    run(settings, records, threads)


def _target_folder(model: str) -> Path:
    from treecast.checkpoints import ensure_default_target

    return ensure_default_target(progress=stderr().print) if model == "default" else Path(model)


def _parse_layers(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise InvalidRequest(f"--layers is {text!r}; it must be like 0,29") from None


def _run_json(settings: TuneSettings, records: int | None, threads: int) -> None:
    write_corpus(
        settings, records, threads, lambda done, of: write_json({"event": "corpus", "done": done})
    )
    report = train(settings, threads, lambda now: write_json({"event": "progress", **_fields(now)}))
    write_json({"event": "result", **_fields(report)})


def _run_with_progress(settings: TuneSettings, records: int | None, threads: int) -> None:
    with _progress() as progress:
        writing = progress.add_task("writing corpus", total=records, visible=records is not None)
        write_corpus(
            settings, records, threads, lambda done, of: progress.update(writing, completed=done)
        )
        training = progress.add_task("training", total=settings.minutes * 60)
        report = train(
            settings,
            threads,
            lambda now: progress.update(
                training, completed=now.elapsed_s, description=_describe(now)
            ),
        )
    _print_report(report)


def write_corpus(
    settings: TuneSettings,
    records: int | None,
    threads: int,
    progress: Callable[[int, int], None],
) -> None:
    """Let the target write until the corpus has `records`; nothing to do for None."""
    if records is None:
        return
    import torch

    from treecast.tuning.selfplay import SelfPlaySettings, generate_corpus

    torch.set_num_threads(threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    generate_corpus(
        SelfPlaySettings(settings.target, settings.corpus, records, seed=settings.seed), progress
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
    text = f"training, step {now.num_steps}, loss {now.loss:.3f}"
    if now.heldout_success:
        text += f", held-out top-1 {now.heldout_success[0]:.3f}"
    return text


def _fields(record: TuneProgress | TuneReport) -> dict[str, object]:
    from dataclasses import asdict

    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(record).items()
    }


def _print_report(report: TuneReport) -> None:
    console = stdout()
    for problem in report.corpus_problems[:5]:
        stderr().print(f"warning: {problem}", style="yellow")
    success = " ".join(f"{value:.3f}" for value in report.heldout_success)
    console.print(f"held-out success of the first 1..5 guesses: {success}")
    console.print(f"{report.num_steps} steps on {report.num_records} records: {report.out}")
    console.print(f"serve it with: treecast up --draft {report.out}", soft_wrap=True)
