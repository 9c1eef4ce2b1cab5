"""`treecast reload`: another draft for a speculator that goes on drafting."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .output import stderr, stdout, write_json

if TYPE_CHECKING:
    from treecast.v1 import speculator_pb2

_TIMEOUT_S = 600.0


def register(app: typer.Typer) -> None:
    app.command()(reload)


def reload(
    speculator: Annotated[
        str, typer.Argument(metavar="HOST:PORT", help="The speculator's own address.")
    ],
    model: Annotated[
        str,
        typer.Argument(
            metavar="[FOLDER]",
            help="Folder of another draft, on the speculator's machine and below its "
            "--drafts-root; by default its own folder, read again.",
            show_default=False,
        ),
    ] = "",
    drafter: Annotated[
        str,
        typer.Option(help="Which of its draft models, by name.", show_default="the only one"),
    ] = "",
    as_json: options.Json = False,
) -> None:
    """Have a speculator load another draft, or a new revision of its own, without losing a session.

    The new draft is loaded beside the old one, which goes on drafting; then sessions go over, and
    no text changes. Sessions under the law mss end with the draft that they began with. A draft
    with another vocabulary or tokenizer is refused, and the old one stays.

    The speculator offers this where it has a --drafts-root; SIGHUP does the same with every draft's
    own folder. Where the mesh has certificates, this needs
    a client's (TREECAST_TLS_CERT, TREECAST_TLS_KEY, TREECAST_TLS_CA).

    For example:

        treecast reload 10.0.0.8:7072 /drafts/tuned-on-monday
    """
    with stderr().status("loading"):
        done = asyncio.run(_reload(speculator, drafter, model))
    if as_json:
        names = ("drafter", "model", "revision", "revision_before")
        counts = ("sessions_moved", "sessions_kept")
        write_json({name: getattr(done, name) for name in (*names, *counts)})
        return
    stdout().print(
        f"{done.drafter}: {done.model} {done.revision} (before: {done.revision_before}), "
        f"{done.sessions_moved} sessions moved, {done.sessions_kept} kept"
    )


async def _reload(address: str, drafter: str, model: str) -> speculator_pb2.ReloadResponse:
    """Raises what the speculator refused it for."""
    import grpc

    from treecast.client.access import read_access
    from treecast.v1 import speculator_pb2, speculator_pb2_grpc
    from treecast.wire.channel import open_channel
    from treecast.wire.status import from_rpc_error

    tls = read_access("", None).tls
    async with open_channel(address, tls=tls, peer_role="speculator") as channel:
        stub = speculator_pb2_grpc.SpeculatorAdminServiceStub(channel)
        request = speculator_pb2.ReloadRequest(drafter=drafter, model=model)
        try:
            return await stub.Reload(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
