"""`treecast generate`: one prompt, its answer streamed."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from treecast.errors import InvalidRequest

from . import options
from .output import stderr, write_json, write_text

if TYPE_CHECKING:
    from treecast.client import ChatMessage, Chunk, Prompt, Result, Stream, Usage


def register(app: typer.Typer) -> None:
    app.command()(generate)


def generate(
    prompt: options.PromptText = None,
    file: options.PromptFile = None,
    raw: options.Raw = False,
    token_ids: options.TokenIds = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Over prompt and output.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Once per token in the output.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="Per token in the output.")] = 0.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = False,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", help="With --json: report this many likeliest.")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Answers to the same prompt.")] = 1,
    max_nodes: options.MaxNodes = None,
    law: options.LawName = "replay",
    proposal: options.ProposalName = None,
    growth: options.Growth = "",
    json_schema: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, metavar="FILE", help="The output is JSON of this schema."
        ),
    ] = None,
    regex: Annotated[str, typer.Option(help="The whole output matches it.")] = "",
    grammar: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, metavar="FILE", help="The output follows it (Lark)."
        ),
    ] = None,
    adapter: options.Adapter = None,
    session: options.Session = None,
    priority: Annotated[int, typer.Option(help="-10..10; higher goes first.")] = 0,
    timeout: options.Timeout = None,
    stats: Annotated[
        bool | None,
        typer.Option("--stats/--no-stats", help="Steps and speed on stderr, at the end."),
    ] = None,
    router: options.Router = None,
    api_key: options.ApiKey = None,
    as_json: options.Json = False,
) -> None:
    """Answer one prompt, streaming the text as it comes.

    For example:

        treecast generate "Name three rivers."

        git diff | treecast generate - --system "Write a commit message."

        treecast generate "Tell a story." -t 0.8 --top-p 0.95 --seed 7 -n 400

        treecast generate "Tell a story." --max-nodes 0   # plain decoding

        treecast generate "Describe a cat as JSON." --json-schema cat.schema.json

        treecast generate "Name three rivers." --adapter pirate

    With --json, each chunk is a line {"event": "chunk", "sample_index", "text", "token_ids",
    "logprobs"}, and the last line is {"event": "result", ...} with usage, seed and timing.
    """
    from treecast.client import Client, SamplingParams

    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        json_schema=_read_rule("--json-schema", json_schema),
        regex=regex,
        grammar=_read_rule("--grammar", grammar),
    )
    asked = read_prompt(prompt, file, raw, token_ids, system)
    with Client(router, api_key=api_key) as client:
        begun = time.monotonic()
        stream = client.generate(
            asked,
            sampling,
            adapter=adapter,
            session_id=session,
            priority=priority,
            timeout_s=timeout,
            max_nodes=max_nodes,
            law=options.law_of(law),
            proposal=options.proposal_of(proposal),
            growth=growth,
            num_samples=num_samples,
        )
        with stream:
            show = _stream_json if as_json else stream_text if num_samples == 1 else _print_samples
            result = show(stream)
        _print_end(result, time.monotonic() - begun, as_json, stats)


def read_prompt(
    prompt: str | None, file: Path | None, raw: bool, token_ids: str | None, system: str | None
) -> Prompt:
    """The prompt from wherever it was given.

    Raises:
        InvalidRequest: it was given nowhere or twice, cannot be read, or is told to be two things.
    """
    said = {"--token-ids": token_ids is not None, "--raw": raw, "--system": system is not None}
    if len(ways := [option for option, is_given in said.items() if is_given]) > 1:
        raise InvalidRequest(f"{ways[0]} and {ways[1]} do not go together; choose one")
    given = [source for source in (prompt, file, token_ids) if source is not None]
    if len(given) != 1:
        raise InvalidRequest(
            f"{len(given)} prompts are given; "
            "give one: PROMPT, '-' for stdin, --file or --token-ids"
        )
    if token_ids is not None:
        return _parse_ids(token_ids)
    text = _read_file("--file", file) if file else sys.stdin.read() if prompt == "-" else prompt
    assert text is not None
    if raw:
        return text
    messages: list[ChatMessage] = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    return messages


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidRequest(f"--token-ids is {text!r}; it must be like 1,2,3") from None


def _read_file(option: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{option} {path} cannot be read: {error}") from error


def _read_rule(option: str, path: Path | None) -> str:
    """What the output must be; nothing where no file is named."""
    text = "" if path is None else _read_file(option, path)
    if path is not None and not text.strip():
        raise InvalidRequest(f"{option} {path} is empty")
    return text


def stream_text(stream: Stream) -> Result:
    ends_line = True
    for chunk in stream:
        write_text(chunk.text)
        ends_line = chunk.text.endswith("\n") if chunk.text else ends_line
    if not ends_line:
        write_text("\n")
    return stream.result()


def _print_samples(stream: Stream) -> Result:
    """Several answers come interleaved, so each is printed when all are there."""
    result = stream.result()
    for sample in result.samples:
        write_text(f"--- sample {sample.index}\n{sample.text.rstrip()}\n")
    return result


def _stream_json(stream: Stream) -> Result:
    for chunk in stream:
        write_json({"event": "chunk", **_chunk_fields(chunk)})
    return stream.result()


def _chunk_fields(chunk: Chunk) -> dict[str, object]:
    return {
        "sample_index": chunk.sample_index,
        "text": chunk.text,
        "token_ids": chunk.token_ids,
        "logprobs": [asdict(item) for item in chunk.logprobs],
    }


def _print_end(result: Result, seconds: float, as_json: bool, stats: bool | None) -> None:
    if as_json:
        write_json({"event": "result", "seconds": round(seconds, 4), **_result_fields(result)})
    # Not into a pipe unasked: there, stderr is for what went wrong.
    if stats or (stats is None and not as_json and stderr().is_terminal):
        print_summary(result, seconds)


def print_summary(result: Result, seconds: float) -> None:
    """What each sample cost, on stderr."""
    for sample in result.samples:
        stderr().print(summary(sample.usage, sample.finish_reason.name, seconds), style="dim")


def _result_fields(result: Result) -> dict[str, object]:
    names = ("request_id", "seed", "model", "model_revision", "numerics_fingerprint")
    more = ("adapter", "prompt_ids", "resumes", "samples")
    return {name: getattr(result, name) for name in (*names, *more)}


def summary(usage: Usage, reason: str, seconds: float) -> str:
    """One line on what an answer cost."""
    per_step = usage.output_tokens / max(usage.steps, 1)
    return (
        f"{usage.output_tokens} tokens in {usage.steps} steps ({per_step:.2f} per step), "
        f"{usage.output_tokens / max(seconds, 1e-9):.0f} tokens/s, "
        f"ended by {reason.lower().replace('_', ' ')}"
    )
