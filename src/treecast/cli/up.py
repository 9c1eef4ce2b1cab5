"""`treecast up`: the whole mesh on this machine, until Ctrl-C."""

from __future__ import annotations

import os
import queue
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from treecast.address import parse_address
from treecast.errors import SettingsError
from treecast.wire.guarded_redis import redacted

from . import options
from .output import stderr, stdout, write_json

if TYPE_CHECKING:
    from treecast.services.local import LocalMesh, MeshSettings, ServiceProcess

DEFAULT_LISTEN = "127.0.0.1:7070"


def register(app: typer.Typer) -> None:
    app.command()(up)


def up(
    model: options.Model = "default",
    draft: options.Draft = "default",
    adapters: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=FOLDER,...",
            help="LoRA adapters in peft's folders; a request names one.",
            show_default=False,
        ),
    ] = None,
    verifiers: Annotated[int, typer.Option(min=1, help="Verifiers to start.")] = 1,
    speculators: options.Speculators = "ssm,ngram",
    numerics: options.Numerics = "exact",
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    weights: options.WeightsKind = "auto",
    planner: options.Planner = "goodput",
    policy: Annotated[
        Literal["tree", "spin", "vote"],
        typer.Option(
            help="tree: verify the union of all drafts; spin: each request's best speculator "
            "alone; vote: one chain by weighted majority."
        ),
    ] = "tree",
    growth: options.Growth = "",
    tp: Annotated[
        int, typer.Option(min=1, help="Processes that divide each layer of a verifier's model.")
    ] = 1,
    pp: Annotated[
        int, typer.Option(min=1, help="Stages that divide its layers, of --tp processes each.")
    ] = 1,
    offload: Annotated[
        Literal["none", "cpu", "disk"],
        typer.Option(
            help="Where layers are kept that --device-memory has no room for, moved to the device "
            "for each pass: cpu: the host's memory, for a GPU; disk: a scratch file."
        ),
    ] = "none",
    device_memory: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="GIB",
            help="With --offload: what weights may take of the device, or with --device cpu of "
            "the host.",
            show_default="what is free",
        ),
    ] = None,
    threads: options.Threads = 2,
    engine: Annotated[
        Literal["hf", "toy"], typer.Option(help="toy: a tiny made-up model, for trying things out.")
    ] = "hf",
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the router listens; port 0 picks one.")
    ] = DEFAULT_LISTEN,
    http_listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Serve the OpenAI-compatible HTTP API here too; needs the extra [http].",
            show_default=False,
        ),
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(
            envvar="TREECAST_REDIS_URL",
            metavar="URL",
            help="A Redis to use, instead of starting a Valkey of its own.",
            show_default=False,
        ),
    ] = None,
    tls: Annotated[
        bool,
        typer.Option("--tls", help="Mutual TLS between all of them, with throwaway certificates."),
    ] = False,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(
            "--api-keys",
            metavar="FILE",
            help="Ask callers for a key of this file, see `treecast keys new`; an admin's key in "
            "TREECAST_API_KEY lets this command look after the mesh.",
            show_default="open to everybody",
        ),
    ] = None,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            envvar="TREECAST_OTLP_ENDPOINT",
            metavar="URL",
            help="An OpenTelemetry collector to send spans to, such as http://127.0.0.1:4317; "
            "needs the extra [traces].",
            show_default="no spans",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Start Valkey, verifiers, speculators and a router here, each a process, until Ctrl-C.

    Needs the extra [engine]. The first start unpacks the default model, which takes a little.

    For example:

        treecast up

        treecast up --model ./my-model --draft ./my-draft --verifiers 2

        treecast up --model ./my-model --tp 2   # each verifier is two processes

        treecast up --offload disk --device-memory 0.3   # weights that do not fit

        treecast up --adapters pirate=./pirate-lora   # then: generate --adapter pirate

        treecast up --json   # one line with all addresses once everything is ready
    """
    from treecast.services.local import MeshSettings

    check_free(listen, "--listen")
    if http_listen is not None:
        check_free(http_listen, "--http-listen")
    settings = MeshSettings(
        model=model,
        draft=draft,
        engine=engine,
        dtype=dtype,
        weights=weights,
        numerics=numerics,
        device=device,
        num_verifiers=verifiers,
        speculators=parse_speculators(speculators),
        torch_threads=threads,
        planner=planner,
        verifier_flags={
            "policy": policy,
            "tp": tp,
            "pp": pp,
            "adapters": adapters,
            "offload": offload,
            "device_memory": device_memory,
        },
        speculator_flags={"growth": growth} if growth else {},
        router_listen=listen,
        http_listen=http_listen,
        redis_url=redis_url,
        tls=tls,
        router_flags={"api_keys_file": api_keys_file} if api_keys_file else {},
        otlp_endpoint=otlp_endpoint,
    )
    with termination_as_interrupt(), running_mesh(settings) as mesh:
        if as_json:
            write_json(describe(mesh))
        else:
            _print_endpoints(mesh)
        _wait_for_end(mesh)


@contextmanager
def running_mesh(settings: MeshSettings) -> Iterator[LocalMesh]:
    """A mesh, with what it is doing shown on stderr while it starts and stops."""
    from treecast.services.local import LocalMesh

    console = stderr()
    with console.status("starting") as shown:

        def report(name: str, state: str) -> None:
            shown.update(f"{name}: {state}")
            if state in ("ready", "stopped") or state.startswith("left out"):
                console.print(f"{name} {state}", style="dim")

        mesh = LocalMesh(settings, report)
        mesh.start()
    try:
        yield mesh
    finally:
        with console.status("stopping") as shown:
            mesh.stop()


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: by way of every `finally`."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def parse_speculators(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def check_free(listen: str, option: str) -> None:
    """Find out before loading anything whether the router will be able to listen.

    Raises:
        SettingsError: the address is malformed or in use.
    """
    address = parse_address(listen, option)
    try:
        with socket.create_server((address.host, address.port), family=address.family):
            pass
    except OSError as error:
        # Not its strerror, to which create_server adds the address once more.
        number = error.errno or 0
        why = os.strerror(number) if number > 0 else error.strerror
        raise SettingsError(
            f"cannot listen on {listen}: {str(why).lower()}; "
            f"choose another address with {option} HOST:PORT (port 0 picks one)"
        ) from error


def describe(mesh: LocalMesh) -> dict[str, object]:
    """Everything that one needs to talk to the mesh or look into it."""
    services = {name: p for name, p in mesh.processes.items() if name != "valkey"}
    return {
        "router": mesh.router_address,
        "redis": redacted(mesh.redis_url),
        "http": mesh.processes["router"].http_address,
        "metrics": {name: process.metrics_address for name, process in services.items()},
        "addresses": {name: process.address for name, process in services.items()},
        "pids": {name: process.pid for name, process in mesh.processes.items()},
        "log_dir": str(mesh.log_dir),
        "environment": client_environment(mesh),
    }


def client_environment(mesh: LocalMesh) -> dict[str, str]:
    """Variables that let a client in; none for a mesh without TLS."""
    from treecast.client.access import TLS_VARIABLES

    files = mesh.certificates.get("client")
    if files is None:
        return {}
    paths = (files.cert, files.key, files.ca)
    return {name: str(path) for name, path in zip(TLS_VARIABLES, paths, strict=True)}


def _print_endpoints(mesh: LocalMesh) -> None:
    from rich.table import Table

    table = Table("service", "gRPC", "metrics", "pid")
    for name, process in mesh.processes.items():
        if name == "valkey":
            table.add_row(name, redacted(mesh.redis_url), "", str(process.pid))
            continue
        metrics = f"http://{process.metrics_address}/metrics" if process.metrics_address else ""
        table.add_row(name, process.address, metrics, str(process.pid))
    console = stdout()
    console.print(table)
    if http := mesh.processes["router"].http_address:
        console.print(f"OpenAI-compatible API: http://{http}/v1")
    console.print(f"logs: {mesh.log_dir}", soft_wrap=True)
    router = "" if mesh.router_address == DEFAULT_LISTEN else f" --router {mesh.router_address}"
    variables = "".join(f"{name}={value} " for name, value in client_environment(mesh).items())
    command = f'{variables}treecast generate "Name three rivers."{router}'
    console.print(f"try:  {command}", soft_wrap=True)
    console.print("Ctrl-C stops the mesh.")


def _wait_for_end(mesh: LocalMesh) -> None:
    """Block until interrupted. A process that is lost is a note, while something can be served.

    Raises:
        MeshError: the router, or the last verifier, has ended.
    """
    ended: queue.SimpleQueue[ServiceProcess] = queue.SimpleQueue()
    for process in mesh.processes.values():
        process.on_exit(ended.put)
    while True:
        process = ended.get()
        failure = process.failure(process.exit_message())
        if not mesh.can_serve:
            raise failure
        stderr().print(f"warning: {failure.message}", style="yellow")
