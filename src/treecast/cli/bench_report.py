"""`treecast bench --report DIR`: what trees are worth, as Markdown and plots."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treecast.errors import InvalidRequest
from treecast.telemetry.logs import configure_logs

from .bench_options import check_options
from .output import stderr, stdout, write_json
from .up import parse_speculators, termination_as_interrupt

if TYPE_CHECKING:
    from treecast.bench.study.bed import StudySettings
    from treecast.bench.study.folder import Folder
    from treecast.bench.study.measure import Show
    from treecast.bench.study.sections import Section

SECTIONS = ("success", "width", "laws", "length", "time", "shape", "calibration")

Directory = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Measure what trees are worth instead, in one process, and write Markdown and "
        "plots; goes on with what the folder lacks.",
    ),
]
Sections = Annotated[
    str, typer.Option(metavar="A,B", help=f"Of --report; some of: {', '.join(SECTIONS)}.")
]
MaxNodes = Annotated[
    int, typer.Option(min=1, max=256, help="Of --report: nodes of a tree as served.")
]


def write_report(context: typer.Context, out: Path) -> None:
    """Measure what the folder lacks of the sections asked for, and write the page.

    Raises:
        InvalidRequest: an option that a report does not heed, an unknown section, no draft
            model, a folder with figures of other settings, or no matplotlib.
    """
    from treecast.bench.study.plots import check_matplotlib
    from treecast.bench.study.render import render

    check_options(context, "--report", ("growth", "sections", "max_nodes"))
    asked = context.params
    sections = parse_sections(asked["sections"])
    settings = settings_of(asked)
    check_matplotlib()
    configure_logs("bench", "report", "warning", as_json=False)
    with termination_as_interrupt():
        folder = _measure(settings, asked["prompts"], asked["limit"], sections, out)
    page = render(folder)
    if asked["as_json"]:
        write_json({"report": str(page)})
    else:
        stdout().print(f"wrote {page}", soft_wrap=True)


def parse_sections(text: str) -> list[Section]:
    """Sections by name, in the report's order.

    Raises:
        InvalidRequest: an unknown one, or none.
    """
    from treecast.bench.study.sections import Section

    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names or any(name not in SECTIONS for name in names):
        raise InvalidRequest(f"--sections is {text!r}; known: {', '.join(SECTIONS)}")
    return [section for section in Section if section.value in names]


def settings_of(asked: Mapping[str, Any]) -> StudySettings:
    """What the command line says of models and trees.

    Raises:
        InvalidRequest: no draft model, or one that is not for the target.
    """
    from treecast.bench.study.bed import StudySettings
    from treecast.engine.loading import resolve_dtype

    drafters = parse_speculators(asked["speculators"])
    if not any(drafter.partition("=")[0] == "ssm" for drafter in drafters):
        raise InvalidRequest(
            f"--speculators is {asked['speculators']!r}; a report needs ssm or ssm=FOLDER in it"
        )
    if "ssm" in drafters and (asked["model"] == "default") != (asked["draft"] == "default"):
        raise InvalidRequest("--model and --draft go together: a draft fits one model")
    return StudySettings(
        model=asked["model"],
        draft=asked["draft"],
        drafters=drafters,
        growth=asked["growth"] or "best-first",
        dtype=resolve_dtype(asked["dtype"]),
        **{name: asked[name] for name in ("max_nodes", "max_tokens", "numerics", "threads")},
    )


def _measure(
    settings: StudySettings,
    prompts: Path | None,
    limit: int | None,
    sections: Sequence[Section],
    out: Path,
) -> Folder:
    from treecast.bench.prompts import DEFAULT_PROMPTS
    from treecast.bench.study.bed import Bed, ask
    from treecast.bench.study.folder import Folder
    from treecast.bench.study.measure import measure
    from treecast.checkpoints import ensure_folder
    from treecast.engine.openmp import spin_briefly

    spin_briefly()
    folder = Folder(out)
    questions = ask(ensure_folder(settings.model), prompts or DEFAULT_PROMPTS, limit)
    bed = Bed(settings, questions, out)
    with _progress() as show:
        measure(bed, folder, sections, shlex.join(["treecast", *sys.argv[1:]]), show)
    return folder


@contextmanager
def _progress() -> Iterator[Show]:
    """One bar; it begins anew with each section."""
    from rich.progress import Progress, TimeElapsedColumn

    columns = [*Progress.get_default_columns(), TimeElapsedColumn()]
    with Progress(*columns, console=stderr(), transient=True) as progress:
        task = progress.add_task("loading", total=None)

        def show(label: str, number: int, total: int) -> None:
            progress.update(task, description=label, completed=number, total=total)

        yield show
