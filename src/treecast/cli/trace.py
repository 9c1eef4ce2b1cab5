"""`treecast trace`: one prompt, and a page that shows how its answer came about."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treecast.errors import InvalidRequest

from . import options
from .generate import print_summary, read_prompt, stream_text
from .output import stderr

if TYPE_CHECKING:
    from treecast.client import Prompt, Result, SamplingParams


def register(app: typer.Typer) -> None:
    app.command()(trace)


def trace(
    prompt: options.PromptText = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Where to write the page.")
    ] = Path("trace.html"),
    file: options.PromptFile = None,
    raw: options.Raw = False,
    token_ids: options.TokenIds = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = False,
    max_nodes: options.MaxNodes = None,
    law: options.LawName = "replay",
    proposal: options.ProposalName = None,
    growth: options.Growth = "",
    session: options.Session = None,
    timeout: options.Timeout = None,
    router: options.Router = None,
    api_key: options.ApiKey = None,
) -> None:
    """Answer one prompt and draw how: each round's tree, who guessed what, and the time it took.

    For example:

        treecast trace "Name three rivers."            # then open trace.html

        treecast trace "Tell a story." -t 0.8 --seed 7 --out story.html

    The page is one file that needs no network. The first 256 rounds are drawn. It holds the prompt
    and the answer: mind whom you send it to.
    """
    from treecast.client import Client, SamplingParams

    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    asked = read_prompt(prompt, file, raw, token_ids, system)
    _check_writable(out)
    with Client(router, api_key=api_key) as client:
        begun = time.monotonic()
        stream = client.generate(
            asked,
            sampling,
            session_id=session,
            timeout_s=timeout,
            max_nodes=max_nodes,
            law=options.law_of(law),
            proposal=options.proposal_of(proposal),
            growth=growth,
            report_rounds=True,
        )
        with stream:
            result = stream_text(stream)
        seconds = time.monotonic() - begun
    _write(out, _prompt_text(asked), result, sampling)
    print_summary(result, seconds)
    stderr().print(f"rounds drawn in {out}: {len(result.rounds)}", soft_wrap=True)


def _check_writable(out: Path) -> None:
    """Before the model works for it."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise InvalidRequest(f"--out {out} cannot be written: it is no file in a folder")


def _write(out: Path, prompt: str, result: Result, sampling: SamplingParams) -> None:
    from treecast.tracepage import render_page

    facts = {"temperature": f"{sampling.temperature:g}"}
    if sampling.temperature > 0:
        facts["seed"] = str(result.seed)
    facts["ended by"] = result.finish_reason.name.lower().replace("_", " ")
    try:
        out.write_text(render_page(prompt, result, facts), encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"--out {out} cannot be written: {error.strerror}") from error


def _prompt_text(prompt: Prompt) -> str:
    """What the page is headed with."""
    if isinstance(prompt, str):
        return prompt
    lines = [
        item["content"] if isinstance(item, dict) and item["role"] == "user" else None
        for item in prompt
    ]
    words = [line for line in lines if line is not None]
    return "\n".join(words) or "tokens " + ", ".join(map(str, prompt))
