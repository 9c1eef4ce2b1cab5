"""`treecast keys`: API keys for a router."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from .output import stderr

keys = typer.Typer(help="Make API keys for a router.", no_args_is_help=True)

Limit = Annotated[int | None, typer.Option(min=1, show_default="none")]


def register(app: typer.Typer) -> None:
    app.add_typer(keys, name="keys")


@keys.command()
def new(
    tenant: Annotated[str, typer.Argument(help="Whom the key is for.")],
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    max_concurrency: Limit = None,
    admin: Annotated[bool, typer.Option("--admin", help="May drain and resume.")] = False,
    expires: Annotated[
        datetime | None, typer.Option(help="Not valid from then on, UTC.", show_default="never")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="Append the entry to this file, rather than print it."),
    ] = None,
) -> None:
    """Make a key, print it once, and print the entry that a router's keys file needs for it.

    The entry holds the key's hash, so that the file tells nobody the key. A running router reads a
    file that changes.

    For example:

        treecast keys new acme --requests-per-minute 60 --file keys.toml
    """
    from treecast.services.router.keys import entry_of, new_key

    key = new_key()
    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_concurrency": max_concurrency,
    }
    entry = entry_of(key, tenant, limits, admin=admin, expires=expires)
    if file is None:
        stderr().print(entry, soft_wrap=True)
    else:
        append(file, entry)
    print(key)


def append(file: Path, entry: str) -> None:
    """Add an entry to a keys file, readable to its owner alone if it is new.

    Raises:
        SettingsError: it would not be a keys file then, or cannot be written.
    """
    from treecast.errors import SettingsError
    from treecast.services.router.keys import parse_keys

    try:
        before = file.read_text() if file.exists() else ""
        parse_keys(f"{before}\n{entry}", str(file))
        if not file.exists():
            file.touch(0o600)
        with file.open("a") as keys_file:
            keys_file.write(f"\n{entry}")
    except OSError as error:
        raise SettingsError(f"{file} cannot be written: {error}") from error
