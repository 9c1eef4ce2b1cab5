"""`treecast bench`: its options, and which of four things it measures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treecast.errors import InvalidRequest

from . import bench_arrivals, bench_report, options
from .bench_comparison import CONTENDERS, write_comparison
from .bench_profile import write_profile


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
    peer_dtype: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TYPE",
            help="A peer's type, bfloat16 or float32, where another suits it better than the "
            "mesh's.",
            show_default=False,
        ),
    ] = None,
    at_once: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="Ask for so many prompts at a time. Of several, transformers-assisted and "
            "llama_cpp, which take one, are left out.",
        ),
    ] = "1",
    model: options.Model = "default",
    draft: options.Draft = "default",
    speculators: options.Speculators = "ssm,ngram",
    numerics: options.Numerics = "exact",
    dtype: options.Dtype = "auto",
    weights: options.WeightsKind = "auto",
    device: options.Device = "cpu",
    planner: options.Planner = "goodput",
    threads: options.Threads = 2,
    out: Annotated[
        Path | None, typer.Option(help="Save all runs as JSON: a file, or a folder for one.")
    ] = None,
    as_json: options.Json = False,
    report: bench_report.Directory = None,
    sections: bench_report.Sections = ",".join(bench_report.SECTIONS),
    max_nodes: bench_report.MaxNodes = 24,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Print where the time of a step goes instead, by phase."),
    ] = False,
    arrivals: bench_arrivals.Process = None,
    levels: bench_arrivals.Levels = "1,2,4,8,16,32",
    seconds: bench_arrivals.Seconds = 60.0,
    seed: bench_arrivals.Seed = 0,
) -> None:
    """Measure transformers and treecast on the same prompts, data type and threads.

    Four contenders, greedy, in turn and interleaved: transformers' generate, its assisted
    generation with the same draft, treecast without trees, and treecast with them, through a real
    mesh. Times are what a caller sees, prefill and drafting included; medians, with quartiles.

    For example:

        treecast bench

        treecast bench --prompts specbench.jsonl --limit 26 --max-tokens 80 --out results/

        treecast bench --contenders treecast-plain,treecast --numerics fast

        treecast bench --report trees/ --prompts specbench.jsonl --limit 26 --max-tokens 80

        treecast bench --peer openvino=/opt/openvino/bin/python --weights int4

        treecast bench --peer vllm=/opt/vllm/bin/python --at-once 1,2,4,8 --limit 8

        treecast bench --profile --weights int8

        treecast bench --arrivals poisson:0.5 --levels 1,4,16 --max-tokens 64 --out load/
    """
    modes = [name for name in ("report", "profile", "arrivals") if context.params[name]]
    if len(modes) > 1:
        raise InvalidRequest(f"--{modes[0]} and --{modes[1]} measure different things; choose one")
    if report is not None:
        bench_report.write_report(context, report)
    elif profile:
        write_profile(context)
    elif arrivals is not None:
        bench_arrivals.write_arrivals(context, arrivals)
    else:
        write_comparison(context)
