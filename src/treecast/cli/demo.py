"""`treecast demo`: a mesh, a few prompts, and what speculation gained on each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .outcome import OTHER
from .output import stdout, write_json, write_text
from .up import (
    parse_speculators,
    running_mesh,
    termination_as_interrupt,
)

if TYPE_CHECKING:
    from rich.table import Table

    from treecast.bench.demonstrate import Comparison
    from treecast.bench.prompts import BenchPrompt
    from treecast.bench.run import TimedResult
    from treecast.client import Client
    from treecast.services.local import MeshSettings


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    prompts: Annotated[
        Path | None, typer.Option(help="Spec-Bench file. Default: eight prompts that ship.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many of them.")] = None,
    max_tokens: options.MaxTokens = 96,
    model: options.Model = "default",
    draft: options.Draft = "default",
    speculators: options.Speculators = "ssm,ngram",
    numerics: options.Numerics = "exact",
    dtype: options.Dtype = "auto",
    threads: options.Threads = 2,
    planner: options.Planner = "full",
    router: options.Router = None,
    api_key: options.ApiKey = None,
    as_json: options.Json = False,
) -> None:
    """Watch a mesh answer a few prompts, then compare with plain decoding.

    Starts a mesh of separate processes (or uses --router), answers each prompt greedily with
    speculation, live, then again plainly through the same verifier, and prints a table of both.
    Exits with 1 if any text differs.

    For example:

        treecast demo

        treecast demo --limit 3 --max-tokens 48 --json
    """
    from treecast.bench.prompts import DEFAULT_PROMPTS, read_prompts
    from treecast.services.local import MeshSettings

    chosen = read_prompts(prompts or DEFAULT_PROMPTS, limit)
    settings = MeshSettings(
        model=model,
        draft=draft,
        speculators=parse_speculators(speculators),
        numerics=numerics,
        dtype=dtype,
        torch_threads=threads,
        planner=planner,
    )
    with termination_as_interrupt(), _client(settings, router, api_key) as client:
        comparisons = _answer_all(client, chosen, max_tokens, as_json)
    if as_json:
        write_json(summarize(comparisons))
    else:
        stdout().print(render(comparisons))
    if not all(comparison.identical for comparison in comparisons):
        raise typer.Exit(OTHER)


@contextmanager
def _client(settings: MeshSettings, router: str | None, api_key: str | None) -> Iterator[Client]:
    """To the router given, or else to a mesh that lives as long as the block."""
    from treecast.client import Client

    if router is not None:
        with Client(router, api_key=api_key) as client:
            yield client
        return
    with (
        running_mesh(settings) as mesh,
        Client(mesh.router_address, tls=mesh.client_files) as client,
    ):
        yield client


def _answer_all(
    client: Client, prompts: Sequence[BenchPrompt], max_tokens: int, as_json: bool
) -> list[Comparison]:
    from treecast.bench.demonstrate import demonstrate, warm_up

    def title(prompt: BenchPrompt) -> None:
        if not as_json:
            first_line = prompt.text.splitlines()[0]
            stdout().print(f"\n{prompt.id}", style="bold cyan", end="  ")
            stdout().print(first_line, style="cyan")

    def text(piece: str) -> None:
        if not as_json:
            write_text(piece)

    warm_up(client)
    comparisons = []
    for comparison in demonstrate(client, prompts, max_tokens, title, text):
        comparisons.append(comparison)
        if not as_json:
            stdout().print("\n" + one_line(comparison), style="dim")
    return comparisons


def one_line(comparison: Comparison) -> str:
    """What one prompt's two answers needed."""
    trees, plain = comparison.speculative, comparison.plain
    tokens = len(trees.result.token_ids)
    return (
        f"{tokens} tokens in {trees.result.usage.steps} steps and {trees.seconds:.1f} s; "
        f"plainly in {plain.result.usage.steps} steps and {plain.seconds:.1f} s; "
        f"identical: {_yes(comparison.identical)}"
    )


def render(comparisons: Sequence[Comparison]) -> Table:
    """One row per prompt and one for all of them."""
    from rich.table import Table

    table = Table(title="Speculative decoding beside plain decoding, same verifier, greedy")
    for name in ("prompt", "tokens", "LLM steps", "plain", "tokens per step", "plain"):
        table.add_column(name, justify="left" if name == "prompt" else "right")
    table.add_column("accepted by depth 1, 2, ...")
    for name in ("tokens/s", "plain", "identical"):
        table.add_column(name, justify="right")
    for comparison in comparisons:
        table.add_row(*_row(comparison.prompt.id, [comparison]))
    table.add_section()
    table.add_row(*_row("all", comparisons), style="bold")
    return table


def _row(name: str, comparisons: Sequence[Comparison]) -> list[str]:
    facts = _facts(comparisons)
    trees, plain = facts["speculative"], facts["plain"]
    depths = " ".join(f"{share:.2f}".lstrip("0") for share in trees["acceptance_by_depth"][:6])
    return [
        name,
        str(trees["tokens"]),
        str(trees["steps"]),
        str(plain["steps"]),
        f"{trees['tokens_per_step']:.2f}",
        f"{plain['tokens_per_step']:.2f}",
        depths,
        f"{trees['tokens_per_s']:.1f}",
        f"{plain['tokens_per_s']:.1f}",
        _yes(facts["identical"]),
    ]


def summarize(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """The table for machines: {"prompts": [...], "all": {...}}."""
    rows = [{"id": item.prompt.id, **_facts([item])} for item in comparisons]
    texts = [{"text": item.speculative.result.text} for item in comparisons]
    mean = sum(row["speculative"]["tokens_per_step"] for row in rows) / len(rows)
    return {
        "prompts": [row | text for row, text in zip(rows, texts, strict=True)],
        "all": {**_facts(comparisons), "mean_tokens_per_step": mean},
    }


def _facts(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    return {
        "speculative": _figures([comparison.speculative for comparison in comparisons]),
        "plain": _figures([comparison.plain for comparison in comparisons]),
        "identical": all(comparison.identical for comparison in comparisons),
    }


def _figures(answers: Sequence[TimedResult]) -> dict[str, Any]:
    from treecast.bench.demonstrate import acceptance_by_depth, tokens_per_s, tokens_per_step

    usages = [answer.result.usage for answer in answers]
    return {
        "tokens": sum(len(answer.result.token_ids) for answer in answers),
        "steps": sum(usage.steps for usage in usages),
        "drafted": sum(usage.drafted for usage in usages),
        "accepted": sum(usage.accepted for usage in usages),
        "seconds": sum(answer.seconds for answer in answers),
        "tokens_per_step": tokens_per_step(answers),
        "tokens_per_s": tokens_per_s(answers),
        "acceptance_by_depth": acceptance_by_depth(usages),
    }


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"
