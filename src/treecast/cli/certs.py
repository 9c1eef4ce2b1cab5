"""`treecast certs`: certificates for trying TLS out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import stderr


def register(app: typer.Typer) -> None:
    app.command()(certs)


def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write them.")],
    hosts: Annotated[
        list[str] | None,
        typer.Option("--host", help="Name or address that clients dial; may be repeated."),
    ] = None,
) -> None:
    """Make a throwaway authority and a certificate for each role, for testing.

    Writes ca.pem, and <role>.pem and <role>.key for router, verifier, speculator and client. Run
    it again for a new authority: services read the files at the next connection, and refuse those
    whose certificate an older one signed. docs/security.md rotates one without that gap.

    For example:

        treecast certs ./certs --host router.example.org
    """
    from treecast.services.local.certificates import LOCAL_HOSTS, make_certificates

    made = make_certificates(folder, (*LOCAL_HOSTS, *(hosts or ())))
    print(f"wrote {folder}/ca.pem and certificates for {', '.join(made)}")
    stderr().print("for testing alone: the authority's key lies beside them", style="dim")
