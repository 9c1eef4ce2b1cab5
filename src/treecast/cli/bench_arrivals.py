"""`treecast bench --arrivals poisson:RATE`: latencies under open-loop load."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treecast.errors import InvalidRequest

from . import options
from .bench_options import (
    OF_A_MESH,
    check_options,
    is_given,
    mesh_settings,
    parse_sizes,
    running_at_most,
)
from .output import stderr, stdout, write_json
from .up import running_mesh, termination_as_interrupt

if TYPE_CHECKING:
    from rich.table import Table

    from treecast.bench.arrivals import Load, LoadSummary
    from treecast.sampling.params import SpeculationParams
    from treecast.services.local import LocalMesh

Process = Annotated[
    str | None,
    typer.Option(
        metavar="poisson:RATE",
        help="Offer load instead: RATE requests a second arrive at random, however busy the "
        "mesh is; latencies count from the planned arrival, so all queueing is in them.",
    ),
]
Levels = Annotated[
    str,
    typer.Option(
        metavar="A,B",
        help="Of --arrivals: most requests in one step, a mesh and the same arrivals for each.",
    ),
]
Seconds = Annotated[
    float,
    typer.Option(min=1, callback=options.finite, help="Of --arrivals: how long requests arrive."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of --arrivals: same seed, same arrivals.")]

_HEEDED = ("law", "proposal", "growth", "contenders", "out", "levels", "seconds", "seed")


def write_arrivals(context: typer.Context, arrivals: str) -> None:
    """Offer the same arrivals at each level, and print and save what became of them.

    Raises:
        InvalidRequest: an option or contender that is not of this mode, arrivals or levels that
            cannot be read, or no matplotlib for `--out`, or no place for it.
    """
    from treecast.bench.arrivals import Poisson
    from treecast.bench.report import check_writable, describe_settings
    from treecast.bench.study.plots import check_matplotlib
    from treecast.engine.loading import resolve_dtype
    from treecast.sampling.params import SpeculationParams

    check_options(context, "--arrivals", (*OF_A_MESH, *_HEEDED))
    asked, plain = context.params, _is_plain(context)
    poisson, levels = Poisson.parse(arrivals), parse_sizes("--levels", asked["levels"])
    planned = poisson.plan(asked["seconds"], asked["seed"])
    if asked["out"] is not None:
        check_matplotlib()
        check_writable(asked["out"] / "arrivals.json")
    speculation = SpeculationParams.of(
        options.law_of(asked["law"]), options.proposal_of(asked["proposal"]), asked["growth"]
    )
    if plain:
        speculation = replace(speculation, max_nodes=0)
    settings = mesh_settings(asked)
    settings = replace(settings, dtype=resolve_dtype(settings.dtype, settings.device))
    loads = []
    with termination_as_interrupt():
        for level in levels:
            stderr().print(f"at most {level} requests in a step")
            flags = running_at_most(level)
            with running_mesh(replace(settings, verifier_flags=flags)) as mesh:
                loads.append(_offer(mesh, level, planned, speculation, asked))
    measured = {
        "contender": "treecast-plain" if plain else "treecast",
        **describe_settings(mesh.settings, speculation),
        **{name: asked[name] for name in ("seconds", "seed", "max_tokens")},
    }
    report = _report(measured, arrivals, loads)
    summaries = [load.summary() for load in loads]
    if asked["as_json"]:
        write_json(report)
    else:
        stdout().print(arrivals_table(summaries, arrivals))
    if asked["out"] is not None:
        _save(report, summaries, arrivals, asked["out"])


def _is_plain(context: typer.Context) -> bool:
    """Whether the load is for decoding without trees."""
    if not is_given(context, "contenders"):
        return False
    contender: str = context.params["contenders"]
    if contender not in ("treecast", "treecast-plain"):
        raise InvalidRequest(
            f"--contenders is {contender!r}; --arrivals knows treecast or treecast-plain"
        )
    return contender == "treecast-plain"


def _offer(
    mesh: LocalMesh,
    level: int,
    planned: Sequence[float],
    speculation: SpeculationParams,
    asked: dict[str, Any],
) -> Load:
    from treecast.bench.arrivals import Load, offer
    from treecast.bench.prompts import DEFAULT_PROMPTS, prompts_for, read_prompts
    from treecast.checkpoints import ensure_folder

    chosen = read_prompts(asked["prompts"] or DEFAULT_PROMPTS, asked["limit"])
    prompts = prompts_for(ensure_folder(mesh.settings.model), chosen)

    def run(at: Sequence[float]) -> list[Any]:
        return asyncio.run(
            offer(mesh.router_address, prompts, at, asked["max_tokens"], speculation)
        )

    run([0.0])  # the first request of a mesh is no measure of the others
    return Load(level, run(planned))


def _report(settings: dict[str, Any], arrivals: str, loads: Sequence[Load]) -> dict[str, Any]:
    """All that is known, for machines."""
    from treecast.bench.machine import describe_machine

    return {
        "arrivals": arrivals,
        "machine": describe_machine(),
        "settings": settings,
        "levels": [
            asdict(load.summary()) | {"answers": [asdict(one) for one in load.answers]}
            for load in loads
        ],
    }


def _save(
    report: dict[str, Any], summaries: Sequence[LoadSummary], arrivals: str, folder: Path
) -> None:
    from treecast.bench.arrival_plots import draw_arrivals

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "arrivals.json").write_text(json.dumps(report, indent=1) + "\n")
    draw_arrivals(summaries, arrivals, folder / "arrivals.png")
    stderr().print(f"saved arrivals.json and arrivals.png in {folder}", soft_wrap=True)


def arrivals_table(summaries: Sequence[LoadSummary], arrivals: str) -> Table:
    """A row per level; latencies from the planned arrival."""
    from rich.table import Table

    table = Table(title=f"{arrivals} a second; p50 / p90 / p95 / p99, ms from planned arrivals")
    for name in ("batch", "offered", "failed", "tokens/s"):
        table.add_column(name, justify="right")
    for name in ("first token", "last token", "between tokens", "sent late"):
        table.add_column(name, justify="right")
    for one in summaries:
        table.add_row(
            str(one.level),
            str(one.offered),
            str(one.failed),
            f"{one.tokens_per_s:.1f}",
            *(
                " / ".join(f"{ms:.0f}" for ms in figures.values())
                for figures in (
                    one.first_token_ms,
                    one.latency_ms,
                    one.per_token_ms,
                    one.sent_late_ms,
                )
            ),
        )
    return table
