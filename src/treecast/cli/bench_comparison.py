"""`treecast bench` itself: transformers, other engines and treecast on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import typer

from treecast.errors import InvalidRequest

from . import options
from .bench_options import (
    OF_A_MESH,
    check_options,
    mesh_settings,
    parse_sizes,
    running_at_most,
)
from .output import stderr, stdout, write_json
from .up import parse_speculators, running_mesh, termination_as_interrupt

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

_HEEDED = (
    "contenders", "rounds", "law", "proposal", "growth", "peer", "peer_model", "peer_dtype",
    "at_once", "out",
)  # fmt: skip

CONTENDERS = ("transformers", "transformers-assisted", "treecast-plain", "treecast")


def write_comparison(context: typer.Context) -> None:
    """Let the contenders answer, and print and save how fast they were.

    Raises:
        InvalidRequest: an option that a comparison does not heed, an unknown contender, a peer
            that cannot be read, no draft model, too few prompts, or a file that cannot be written.
    """
    from treecast.bench.compare import check_sizes
    from treecast.bench.peer import PeerChoice
    from treecast.bench.prompts import DEFAULT_PROMPTS, read_prompts
    from treecast.bench.report import report_file
    from treecast.engine.loading import resolve_dtype
    from treecast.sampling.params import SpeculationParams

    check_options(context, "a comparison", (*OF_A_MESH, *_HEEDED))
    asked = context.params
    names = _check_names(asked["contenders"])
    choices = PeerChoice.parse(
        *(asked[name] or () for name in ("peer", "peer_model", "peer_dtype"))
    )
    check_draft(asked["model"], asked["draft"], asked["speculators"])
    prompts = read_prompts(asked["prompts"] or DEFAULT_PROMPTS, asked["limit"])
    sizes = parse_sizes("--at-once", asked["at_once"])
    check_sizes(sizes, len(prompts))
    settings = mesh_settings(asked)
    settings = replace(
        settings,
        dtype=resolve_dtype(settings.dtype, settings.device),
        verifier_flags=running_at_most(max(sizes)),
    )
    speculation = SpeculationParams.of(
        options.law_of(asked["law"]), options.proposal_of(asked["proposal"]), asked["growth"]
    )
    file = None if asked["out"] is None else report_file(asked["out"])
    with termination_as_interrupt():
        compared = _measure(
            settings,
            speculation,
            names,
            prompts,
            sizes,
            asked["max_tokens"],
            asked["rounds"],
            choices,
        )
    if asked["as_json"]:
        write_json(compared)
    else:
        stdout().print(render(compared))
    if file is not None:
        compared.save(file)
        stderr().print(f"saved to {file}", soft_wrap=True)


def _measure(
    settings: MeshSettings,
    speculation: SpeculationParams,
    names: Sequence[str],
    prompts: Sequence[BenchPrompt],
    sizes: Sequence[int],
    max_tokens: int,
    rounds: int,
    choices: Sequence[PeerChoice],
) -> Report:
    """Start the mesh and the peers' processes, and let the contenders answer."""
    from treecast.bench.compare import in_groups, interleave
    from treecast.bench.peer import PeerContender, transformers_peer
    from treecast.bench.report import Report
    from treecast.client import Client

    with (
        running_mesh(settings) as mesh,
        Client(mesh.router_address, tls=mesh.client_files) as client,
        transformers_peer(mesh.settings) as peer,
        ExitStack() as others,
    ):
        prompt_ids = {prompt.id: peer.encode(prompt.text) for prompt in prompts}
        field, versions = _contenders(names, client, peer, speculation), dict(peer.versions)
        for choice in choices:
            other = others.enter_context(choice.process(mesh.settings, max(sizes)))
            field.append(PeerContender(choice.name, other, batches=choice.batches))
            versions |= other.versions
        groups = {size: in_groups(prompt_ids, size) for size in sizes}
        runs: list[Run] = []
        with _progress(sum(map(len, groups.values())) * len(field) * rounds) as show:
            for size in sizes:
                runs += interleave(field, groups[size], max_tokens, rounds, show)
        every = [one.name for one in field]
        return Report.of(mesh.settings, speculation, max_tokens, rounds, every, runs, versions)


def _check_names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown or not names or len(set(names)) < len(names):
        known = ", ".join(CONTENDERS)
        raise InvalidRequest(f"--contenders is {text!r}; known: {known}, each at most once")
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
        "transformers-assisted": lambda name: PeerContender(name, peer, "assisted", batches=False),
        "treecast-plain": lambda name: MeshContender(name, client, plain),
        "treecast": lambda name: MeshContender(name, client, speculation),
    }
    return [make[name](name) for name in names]


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Run], None]]:
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=stderr(), transient=True) as progress:
        task = progress.add_task("running", total=total)

        def show(run: Run) -> None:
            asked = ", ".join(answer.prompt_id for answer in run.answers)
            said = f"{asked}: {run.contender} {run.tokens_per_s:.0f} tokens/s"
            progress.update(task, advance=1, description=escape(said))

        yield show


def render(report: Report) -> Table:
    """One row per contender and number of prompts at once."""
    from rich.table import Table

    settings = report.settings
    title = (
        f"{settings['model']}, {settings['dtype']}, treecast numerics {settings['numerics']}, "
        f"{settings['threads']} threads; median (quartiles)"
    )
    references = list(
        dict.fromkeys(one.contender for one in report.summaries if one.contender in PLAIN)
    )
    table = Table(title=title)
    table.add_column("at once", justify="right")
    table.add_column("contender")
    agreement = [f"same as {name}" for name in references]
    first = report.summaries[0].contender
    for name in ("tokens/s", f"times {first}", "overall", "step ms", "tokens per step", *agreement):
        table.add_column(name, justify="right")
    for summary in report.summaries:
        table.add_row(
            str(summary.at_once),
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
    if reference not in summary.same_tokens_as:
        return ""
    return f"{summary.same_tokens_as[reference]} of {summary.num_prompts}"


def _spread(spread: Spread, digits: int) -> str:
    return f"{spread.median:.{digits}f} ({spread.lower:.{digits}f}-{spread.upper:.{digits}f})"
