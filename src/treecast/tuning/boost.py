"""Tune a collective of drafts on what their target writes.

Collective boost-tuning: the first draft learns all of the corpus; each further one learns only the
positions whose token no draft before it guesses first. Merged into one tree, they cover more than
each alone.

Source: Miao et al., arXiv 2305.09781, section 3.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from treecast.checkpoints import read_trained
from treecast.errors import ModelError
from treecast.tuning.draft import check_layers, default_layers
from treecast.tuning.draft_run import TRAINED_FILE, TRAINING, DraftPlan, DraftRun
from treecast.tuning.heldout import (
    NUM_GUESSES,
    completion_tokens,
    heldout_guesses,
    success,
    union_sizes,
    union_success,
)
from treecast.tuning.material import Material, gather
from treecast.tuning.report import write_report
from treecast.tuning.settings import DraftReport, ProgressFn, TuneReport, TuneSettings

T = TypeVar("T")


def tune(settings: TuneSettings, progress: ProgressFn | None = None) -> TuneReport:
    """Train the drafts and write each as a model folder, and a report beside them.

    One draft becomes `settings.out` itself, several `out/draft-1` and so on, the single one to
    compare them with `out/single`. Blocks until the deadline. Safe to interrupt and to run again:
    training goes on from the last checkpoint in each folder's `training`, and finished drafts are
    kept. A finished run leaves the trained weights alone there, and running it again starts anew.

    Raises:
        ModelError: the target is no causal LM, a layer is out of range, `out` holds something else,
            the checkpoint in it belongs to other settings, or the disk is full.
        CorpusError: the corpus has no complete record, or token ids beyond the vocabulary.
    """
    show = progress or (lambda _progress: None)
    check(settings)
    material = gather(settings)
    num_layers = material.target.config.num_hidden_layers
    plans = [_plan(settings, num_layers, number) for number in range(1, settings.drafts + 1)]
    single_plan = _single_plan(settings, num_layers, plans)
    for plan in [*plans, single_plan] if settings.compare_single else plans:
        _check_start(plan)
    runs: list[DraftRun] = []
    reports: list[DraftReport] = []
    dropped: dict[int, Tensor] = {}
    for plan in plans:
        run = DraftRun(settings, material, plan, dropped)
        reports.append(run.run(show))
        runs.append(run)
        if plan is not plans[-1]:
            dropped = run.covered()
    single: tuple[DraftRun, DraftReport] | None = None
    if settings.compare_single:
        run = DraftRun(settings, material, single_plan, {})
        single = run, run.run(show)
    report = _report(settings, material, runs, reports, single)
    write_report(report)
    for run in (*runs, single[0]) if single else runs:
        run.forget()
    return report


def check(settings: TuneSettings) -> None:
    """Refuse what would end badly after hours.

    Raises:
        ModelError: a number is out of range, or a folder or file would be overwritten that is
            no draft in training.
    """
    if settings.drafts < 1:
        raise ModelError(f"drafts is {settings.drafts}; it must be 1 or more")
    if not 0 < settings.minutes < float("inf"):
        raise ModelError(f"minutes is {settings.minutes}; it must be a number above 0")
    if len(settings.layers) > settings.drafts:
        raise ModelError(f"{len(settings.layers)} lists of layers for {settings.drafts} drafts")
    if len(settings.start) > settings.drafts:
        raise ModelError(
            f"{len(settings.start)} weights to start from for {settings.drafts} drafts"
        )
    num_guesses = NUM_GUESSES * settings.drafts
    if settings.compare_single and 0 < settings.head_rows < num_guesses:
        raise ModelError(
            f"a head of {settings.head_rows} tokens is too small for the single draft's "
            f"{num_guesses} guesses"
        )
    for folder in (*_folders(settings), *([settings.out / "single"] * settings.compare_single)):
        _check_folder(folder, settings)


def _check_folder(folder: Path, settings: TuneSettings) -> None:
    if folder.resolve() == settings.target.resolve():
        raise ModelError(f"{folder} is the target's own folder; name another for the draft")
    training = folder / TRAINING
    if (folder / "config.json").exists() and not training.is_dir():
        raise ModelError(f"{folder} holds a model that was not tuned there; name another folder")
    for start in settings.start:
        if start.resolve() == (training / TRAINED_FILE).resolve():
            raise ModelError(f"the start {start} would be overwritten; name another output folder")


def _folders(settings: TuneSettings) -> list[Path]:
    """Of the drafts in turn, without the single one."""
    if settings.drafts == 1:
        return [settings.out]
    return [settings.out / f"draft-{number}" for number in range(1, settings.drafts + 1)]


def _plan(settings: TuneSettings, num_layers: int, number: int) -> DraftPlan:
    layers = _of(settings.layers, number)
    return DraftPlan(
        f"draft-{number}",
        _folders(settings)[number - 1],
        default_layers(min(2, num_layers), num_layers) if layers is None else layers,
        settings.minutes,
        _of(settings.start, number),
    )


def _single_plan(settings: TuneSettings, num_layers: int, plans: list[DraftPlan]) -> DraftPlan:
    """As many layers, spread anew, and as many minutes as the drafts have together."""
    total = min(num_layers, sum(len(plan.layers) for plan in plans))
    return DraftPlan(
        "single",
        settings.out / "single",
        default_layers(total, num_layers),
        settings.minutes * settings.drafts,
        _of(settings.start, settings.drafts),
    )


def _of(each: Sequence[T], number: int) -> T | None:
    """What is given for a draft, of 1; the last serves those that are left."""
    return each[min(number, len(each)) - 1] if each else None


def _check_start(plan: DraftPlan) -> None:
    """Raise ModelError where a draft lacks layers of its start, before others are trained."""
    if plan.start is not None:
        check_layers(plan.start, read_trained(plan.start).layers, plan.layers)


def _report(
    settings: TuneSettings,
    material: Material,
    runs: list[DraftRun],
    reports: list[DraftReport],
    single: tuple[DraftRun, DraftReport] | None,
) -> TuneReport:
    heldout = material.split.heldout
    truth = completion_tokens(material.records, heldout)
    guesses = [
        heldout_guesses(run.draft, material.records, heldout, run.head_token_ids) for run in runs
    ]
    ranks: tuple[float, ...] = ()
    if single is not None:
        run, _ = single
        count = guesses[0].shape[1] * len(runs)
        ranks = success(
            heldout_guesses(
                run.draft, material.records, heldout, run.head_token_ids, num_guesses=count
            ),
            truth,
        )
    return TuneReport(
        report=settings.report or settings.out,
        drafts=tuple(reports),
        union_success=union_success(guesses, truth),
        union_guesses=union_sizes(guesses),
        single=single[1] if single else None,
        single_ranks=ranks,
        num_records=len(material.records),
        num_heldout=len(heldout),
        num_heldout_tokens=len(truth),
        corpus_problems=material.corpus.problems,
    )
