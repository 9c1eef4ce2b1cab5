"""Options that several commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from treecast.sampling.params import Law, Proposal
from treecast.settings import DType, Weights

Router = Annotated[
    str | None,
    typer.Option(
        "--router",
        "-r",
        envvar="TREECAST_ROUTER",
        metavar="HOST:PORT",
        help="Router to talk to; several with commas between. Default: 127.0.0.1:7070.",
        show_default=False,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="TREECAST_API_KEY",
        metavar="KEY",
        help="Key for a router that asks for one; better in the variable, which nobody else sees.",
        show_default=False,
        show_envvar=True,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="NAME",
        help="Compute the model with this LoRA adapter; `treecast models list` names them.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of text.")]
Session = Annotated[
    str | None,
    typer.Option("--session", metavar="ID", help="Keep the KV cache for the next request."),
]
PromptText = Annotated[
    str | None, typer.Argument(help="The prompt; '-' reads it from stdin.", show_default=False)
]
PromptFile = Annotated[
    Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")
]
Raw = Annotated[
    bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")
]
TokenIds = Annotated[
    str | None, typer.Option("--token-ids", metavar="1,2,3", help="The prompt as token ids.")
]
System = Annotated[str | None, typer.Option("--system", help="System message before the prompt.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", help="Text that ends the output; repeatable.")
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end.")]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "-n", help="Most tokens to generate.", show_default=True)
]
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", help="0 is greedy; higher is more varied.")
]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens of this mass.")]
MinP = Annotated[
    float, typer.Option("--min-p", help="Keep tokens of this share of the likeliest one's mass.")
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Same seed, same text.", show_default="drawn by the router"),
]
MaxNodes = Annotated[
    int | None,
    typer.Option(
        "--max-nodes",
        help="Most tree nodes per step; 0 decodes plainly.",
        show_default="the verifier's choice",
    ),
]
LawName = Annotated[
    Literal["replay", "mss"],
    typer.Option("--law", help="How trees are accepted; mss needs trusted speculators."),
]
ProposalName = Annotated[
    Literal["coupled", "topk", "iid", "without_replacement"] | None,
    typer.Option(
        "--proposal",
        help="How drafts choose children; mss serves iid and without_replacement.",
        show_default="coupled, under mss without_replacement",
    ),
]
Growth = Annotated[
    str,
    typer.Option(
        "--growth",
        metavar="POLICY",
        help="How trees grow: best-first, dp (the best for what was accepted lately), or widths "
        "by level such as '<1,1,3>'.",
        show_default="the speculator's own",
    ),
]
Timeout = Annotated[
    float | None, typer.Option("--timeout", metavar="SECONDS", help="Give up after this long.")
]

Model = Annotated[
    str,
    typer.Option(
        "--model",
        envvar="TREECAST_MODEL",
        metavar="PATH",
        help="Model folder of the LLM; 'default' is SmolLM2-135M-Instruct.",
    ),
]
Draft = Annotated[
    str,
    typer.Option(
        "--draft",
        envvar="TREECAST_DRAFT",
        metavar="PATH",
        help="Model folder of the draft; 'default' is the one that ships.",
    ),
]
Numerics = Annotated[
    Literal["exact", "fast"],
    typer.Option(help="exact: the same bits with any tree or batch; fast: free to reorder sums."),
]
Dtype = Annotated[
    DType,
    typer.Option(
        help="Weights and activations; auto: bfloat16 where the processor multiplies it, "
        "else float32."
    ),
]
WeightsKind = Annotated[
    Weights,
    typer.Option(
        help="Of the LLM's linear layers on CPU: bfloat16, int8, int4 take a half, a quarter, a "
        "sixth of float32's memory; auto: 16 bits where they lose nothing."
    ),
]
Speculators = Annotated[
    str,
    typer.Option(
        metavar="ssm,ngram",
        help="Drafters, a process each: ssm, another draft as ssm=FOLDER, ngram, suffix; '' for "
        "none.",
    ),
]
Planner = Annotated[
    Literal["goodput", "full"],
    typer.Option(
        help="goodput: verify tree nodes only while that is faster; full: all that are offered, "
        "which saves most passes of the LLM."
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="NAME", help="Where models compute: cpu, cuda, or one such as cuda:1."
    ),
]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads of each forward pass.")]


def law_of(name: str) -> Law:
    """What `--law` names."""
    return Law[name.upper()]


def proposal_of(name: str | None) -> Proposal | None:
    """What `--proposal` names; None is the law's own."""
    return None if name is None else Proposal[name.upper()]


def finite(value: float | None) -> float | None:
    """Bounds alone let nan and inf through."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value
