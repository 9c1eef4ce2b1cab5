"""`treecast drain` and `treecast resume`: a router or a verifier out of service and back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from . import options

if TYPE_CHECKING:
    from treecast.client import Client

_POLL_S = 0.25

Target = Annotated[
    str,
    typer.Argument(
        metavar="[VERIFIER]",
        help="Address or instance id of a verifier, as `treecast status` shows them; the router "
        "itself by default.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    app.command()(drain)
    app.command()(resume)


def drain(
    target: Target = "",
    hand_over_after: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="Let other verifiers go on with what still runs then.",
            show_default="never: it finishes there",
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return once nothing runs there.")] = False,
    router: options.Router = None,
    api_key: options.ApiKey = None,
) -> None:
    """Take a verifier, or the router, out of service: nothing new starts there.

    Streams that run finish, or are handed over to other verifiers with nothing lost. Needs an
    admin's key where the router has keys.

    For example:

        treecast drain 10.0.0.7:7071 --hand-over-after 10 --wait
    """
    from treecast.client import Client

    with Client(router, api_key=api_key) as client:
        running = client.drain(target, hand_over_after)
        while wait and running:
            time.sleep(_POLL_S)
            running = _running(client, target)
    print(f"draining, {running} running")


def resume(
    target: Target = "", router: options.Router = None, api_key: options.ApiKey = None
) -> None:
    """Put a drained verifier, or the router, back into service."""
    from treecast.client import Client

    with Client(router, api_key=api_key) as client:
        client.resume(target)
    print("resumed")


def _running(client: Client, target: str) -> int:
    status = client.status()
    if not target:
        return status.running + status.queued
    there = [one for one in status.verifiers if target in (one.address, one.instance_id)]
    return sum(one.running + one.waiting for one in there)
