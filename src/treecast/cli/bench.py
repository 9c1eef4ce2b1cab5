"""`treecast bench`: transformers, other engines and treecast, side by side on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treecast.errors import InvalidRequest

from . import options
from .bench_arrivals import write_arrivals
from .bench_profile import write_profile
from .bench_report import SECTIONS, write_report
from .output import stderr, stdout, write_json
from .up import (
    Dtype,
    Numerics,
    Speculators,
    WeightsKind,
    parse_speculators,
    running_mesh,
    termination_as_interrupt,
)

if TYPE_CHECKING:
    from rich.table import Table

    from treecast.bench.compare import Spread, Summary
    from treecast.bench.peer import PeerChoice, PeerProcess
    from treecast.bench.prompts import BenchPrompt
    from treecast.bench.report import Report
    from treecast.bench.run import Contender, Run
    from treecast.client import Client
    from treecast.sampling.params import SpeculationParams
    from treecast.services.local import MeshSettings

PLAIN = ("transformers", "treecast-plain")
"""Decoding without speculation: what the others should agree with."""

CONTENDERS = ("transformers", "transformers-assisted", "treecast-plain", "treecast")


def register(app: typer.Typer) -> None:
    app.command()(bench)


def bench(
    context: typer.Context,
    prompts: Annotated[
        Path | None, typer.Option(help="Spec-Bench file. Default: eight prompts that ship.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many of them.")] = None,
    max_tokens: options.MaxTokens = 96,
    law: options.LawName = "replay",
    proposal: options.ProposalName = None,
    growth: options.Growth = "",
    rounds: Annotated[int, typer.Option(min=1, help="Timed answers per prompt.")] = 3,
    contenders: Annotated[
        str, typer.Option(metavar="A,B", help=f"Some of: {', '.join(CONTENDERS)}.")
    ] = ",".join(CONTENDERS),
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PYTHON",
            help="Another engine beside them, run by the Python that has its package: vllm, "
            "openvino (openvino_genai) or llama_cpp; repeatable. Same prompts and threads.",
            show_default=False,
        ),
    ] = None,
    peer_model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="A peer's weights, where it cannot read the model's folder: a GGUF file. Default: "
            "of the default model, the file that it was made of.",
            show_default=False,
        ),
    ] = None,
    model: options.Model = "default",
    draft: options.Draft = "default",
    speculators: Speculators = "ssm,ngram",
    numerics: Numerics = "exact",
    dtype: Dtype = "auto",
    weights: WeightsKind = "auto",
    device: options.Device = "cpu",
    planner: options.Planner = "goodput",
    threads: options.Threads = 2,
    out: Annotated[
        Path | None, typer.Option(help="Save all runs as JSON: a file, or a folder for one.")
    ] = None,
    as_json: options.Json = False,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Measure what trees are worth instead, in one process, and write Markdown and "
            "plots; goes on with what the folder lacks.",
        ),
    ] = None,
    sections: Annotated[
        str, typer.Option(metavar="A,B", help=f"Of --report; some of: {', '.join(SECTIONS)}.")
    ] = ",".join(SECTIONS),
    max_nodes: Annotated[
        int, typer.Option(min=1, max=256, help="Of --report: nodes of a tree as served.")
    ] = 24,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Print where the time of a step goes instead, by phase."),
    ] = False,
    arrivals: Annotated[
        str | None,
        typer.Option(
            metavar="poisson:RATE",
            help="Offer load instead: RATE requests a second arrive at random, however busy the "
            "mesh is; latencies count from the planned arrival, so all queueing is in them.",
        ),
    ] = None,
    levels: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="Of --arrivals: most requests in one step, a mesh and the same arrivals for each.",
        ),
    ] = "1,2,4,8,16,32",
    seconds: Annotated[
        float, typer.Option(min=1, help="Of --arrivals: how long requests arrive.")
    ] = 60.0,
    seed: Annotated[int, typer.Option(help="Of --arrivals: same seed, same arrivals.")] = 0,
) -> None:
    """Measure transformers and treecast on the same prompts, data type and threads.

    Four contenders, greedy, one at a time and interleaved: transformers' generate, its assisted
    generation with the same draft, treecast without trees, and treecast with them, through a real
    mesh. Times are what a caller sees, prefill and drafting included; medians, with quartiles.

    For example:

        treecast bench

        treecast bench --prompts specbench.jsonl --limit 26 --max-tokens 80 --out results/

        treecast bench --contenders treecast-plain,treecast --numerics fast

        treecast bench --report trees/ --prompts specbench.jsonl --limit 26 --max-tokens 80

        treecast bench --peer openvino=/opt/openvino/bin/python --weights int4

        treecast bench --profile --weights int8

        treecast bench --arrivals poisson:0.5 --levels 1,4,16 --max-tokens 64 --out load/
    """
    modes = [name for name in ("report", "profile", "arrivals") if context.params[name]]
    if len(modes) > 1:
        raise InvalidRequest(f"--{modes[0]} and --{modes[1]} measure different things; choose one")
    if report is not None:
        write_report(context, report)
    elif profile:
        write_profile(context)
    elif arrivals is not None:
        write_arrivals(context, arrivals)
    if modes:
        return
    from treecast.bench.peer import PeerChoice
    from treecast.bench.prompts import DEFAULT_PROMPTS, read_prompts
    from treecast.engine.loading import resolve_dtype
    from treecast.sampling.params import SpeculationParams
    from treecast.services.local import MeshSettings

    names, choices = _check_names(contenders), PeerChoice.parse(peer or (), peer_model or ())
    check_draft(model, draft, speculators)
    chosen = read_prompts(prompts or DEFAULT_PROMPTS, limit)
    settings = MeshSettings(
        model=model,
        draft=draft,
        speculators=parse_speculators(speculators),
        numerics=numerics,
        device=device,
        dtype=resolve_dtype(dtype, device),
        weights=weights,
        torch_threads=threads,
        planner=planner,
    )
    speculation = SpeculationParams.of(options.law_of(law), options.proposal_of(proposal), growth)
    with termination_as_interrupt():
        compared = _measure(settings, speculation, names, chosen, max_tokens, rounds, choices)
    if out is not None:
        stderr().print(f"saved to {compared.save(out)}", soft_wrap=True)
    if as_json:
        write_json(compared)
    else:
        stdout().print(render(compared))


def _measure(
    settings: MeshSettings,
    speculation: SpeculationParams,
    names: Sequence[str],
    prompts: Sequence[BenchPrompt],
    max_tokens: int,
    rounds: int,
    choices: Sequence[PeerChoice],
) -> Report:
    """Start the mesh and the peers' processes, and let the contenders answer."""
    from treecast.bench.compare import interleave
    from treecast.bench.peer import PeerContender, transformers_peer
    from treecast.bench.report import Report
    from treecast.client import Client

    with (
        running_mesh(settings) as mesh,
        Client(mesh.router_address) as client,
        transformers_peer(mesh.settings) as peer,
        ExitStack() as others,
    ):
        prompt_ids = {prompt.id: peer.encode(prompt.text) for prompt in prompts}
        field, versions = _contenders(names, client, peer, speculation), dict(peer.versions)
        for choice in choices:
            other = others.enter_context(choice.process(mesh.settings))
            field.append(PeerContender(choice.name, other))
            versions |= other.versions
        with _progress(len(prompts) * len(field) * rounds) as show:
            runs = interleave(field, prompt_ids, max_tokens, rounds, show)
        every = [one.name for one in field]
        return Report.of(mesh.settings, speculation, max_tokens, rounds, every, runs, versions)


def _check_names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown or not names:
        raise InvalidRequest(f"--contenders is {text!r}; known: {', '.join(CONTENDERS)}")
    return names


def check_draft(model: str, draft: str, speculators: str) -> None:
    """Assisted generation needs a draft, and so needs the comparison a fair one.

    Raises:
        InvalidRequest: there is none for this model, or no speculator uses it.
    """
    if (model == "default") != (draft == "default"):
        raise InvalidRequest("--model and --draft go together: a draft fits one model")
    if "ssm" not in parse_speculators(speculators):
        raise InvalidRequest(f"--speculators is {speculators!r}; the comparison needs ssm in it")


def _contenders(
    names: Sequence[str], client: Client, peer: PeerProcess, speculation: SpeculationParams
) -> list[Contender]:
    from treecast.bench.peer import PeerContender
    from treecast.bench.run import MeshContender
    from treecast.sampling.params import SpeculationParams

    plain = SpeculationParams(max_nodes=0)

    make: dict[str, Callable[[str], Contender]] = {
        "transformers": lambda name: PeerContender(name, peer, "generate"),
        "transformers-assisted": lambda name: PeerContender(name, peer, "assisted"),
        "treecast-plain": lambda name: MeshContender(name, client, plain),
        "treecast": lambda name: MeshContender(name, client, speculation),
    }
    return [make[name](name) for name in names]


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Run], None]]:
    from rich.progress import Progress

    with Progress(console=stderr(), transient=True) as progress:
        task = progress.add_task("running", total=total)

        def show(run: Run) -> None:
            said = f"{run.prompt_id}: {run.contender} {run.tokens_per_s:.0f} tokens/s"
            progress.update(task, advance=1, description=said)

        yield show


def render(report: Report) -> Table:
    """One row per contender."""
    from rich.table import Table

    settings = report.settings
    title = (
        f"{settings['model']}, {settings['dtype']}, treecast numerics {settings['numerics']}, "
        f"{settings['threads']} threads; median (quartiles)"
    )
    references = [one.contender for one in report.summaries if one.contender in PLAIN]
    table = Table(title=title)
    table.add_column("contender")
    agreement = [f"same as {name}" for name in references]
    first = report.summaries[0].contender
    for name in ("tokens/s", f"times {first}", "overall", "step ms", "tokens per step", *agreement):
        table.add_column(name, justify="right")
    for summary in report.summaries:
        table.add_row(
            summary.contender,
            _spread(summary.tokens_per_s, 1),
            _spread(ratio, 2) if (ratio := summary.times_as_fast_as.get(first)) else "",
            f"{summary.overall_tokens_per_s:.1f}",
            _spread(summary.step_ms, 1) if summary.step_ms else "",
            _spread(summary.tokens_per_step, 2),
            *(_same(summary, name) for name in references),
        )
    return table


def _same(summary: Summary, reference: str) -> str:
    if summary.contender == reference:
        return ""
    return f"{summary.same_tokens_as[reference]} of {summary.num_prompts}"


def _spread(spread: Spread, digits: int) -> str:
    return f"{spread.median:.{digits}f} ({spread.lower:.{digits}f}-{spread.upper:.{digits}f})"
