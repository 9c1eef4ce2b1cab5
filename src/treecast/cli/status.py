"""`treecast status`: workers, queue and load, as the router sees them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .output import stdout, write_json

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from treecast.client import Status, VerifierStatus


def register(app: typer.Typer) -> None:
    app.command()(status)


def status(
    watch: Annotated[
        float | None,
        typer.Option(
            "--watch",
            "-w",
            metavar="SECONDS",
            min=0.1,
            max=86400,
            callback=options.finite,
            help="Look again this often.",
        ),
    ] = None,
    router: options.Router = None,
    api_key: options.ApiKey = None,
    as_json: options.Json = False,
) -> None:
    """Show the verifiers, their speculators, the queue and the load.

    Exits with 3 when no router answers, so it serves as a probe too.

    For example:

        treecast status

        treecast status --watch 1

        treecast status --json | jq '.verifiers[].healthy'
    """
    from treecast.client import Client

    with Client(router, api_key=api_key) as client:
        if watch is None:
            _print(client.status(), as_json)
        elif as_json:
            while True:
                write_json(client.status())
                time.sleep(watch)
        else:
            _watch(client.status, watch)


def _print(now: Status, as_json: bool) -> None:
    if as_json:
        write_json(now)
    else:
        stdout().print(render(now))


def _watch(ask: Callable[[], Status], every_s: float) -> None:
    from rich.live import Live

    with Live(render(ask()), console=stdout(), auto_refresh=False) as live:
        while True:
            time.sleep(every_s)
            live.update(render(ask()), refresh=True)


def render(now: Status) -> Group:
    """A line on the mesh and a table of its verifiers."""
    from rich.console import Group

    redis = "ok" if now.redis_ok else "not there, so sessions may move between verifiers"
    line = f"running {now.running}, queued {now.queued}, redis {redis}"
    if now.draining:
        line += ", draining"
    return Group(line, _verifier_table(now))


def _health(verifier: VerifierStatus) -> Text:
    from rich.text import Text

    if verifier.draining:
        return Text("draining", "yellow")
    return Text("healthy", "green") if verifier.healthy else Text("down", "red")


def _verifier_table(now: Status) -> Table:
    from rich.table import Table

    table = Table(
        "verifier", "health", "model", "running", "waiting", "KV pages free", "speculators"
    )
    for verifier in now.verifiers:
        table.add_row(
            verifier.address,
            _health(verifier),
            f"{verifier.model} {verifier.model_revision}".strip(),
            str(verifier.running),
            str(verifier.waiting),
            f"{verifier.kv_pages_free} of {verifier.kv_pages_total}",
            "\n".join(verifier.speculators) or "none",
        )
    return table
