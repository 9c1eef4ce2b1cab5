"""The program and its commands."""

from __future__ import annotations

from typing import Annotated

import typer

from treecast import __version__

from . import (
    bench,
    certs,
    chat,
    demo,
    drain,
    generate,
    keys,
    models,
    reload,
    status,
    trace,
    tune,
    up,
)
from .outcome import EXIT_CODES, Commands

app = typer.Typer(
    name="treecast",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"treecast {__version__}")
        raise typer.Exit


@app.callback()
def treecast(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Serve a large language model with tree-based speculative inference.

    Start a mesh in one terminal with `treecast up`, and use it from another with
    `treecast generate "Write a short poem about the sea."`; each command's --help has more.
    """


for module in (
    up,
    generate,
    chat,
    trace,
    status,
    drain,
    reload,
    keys,
    certs,
    models,
    tune,
    bench,
    demo,
):
    module.register(app)
