"""The router as a process."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import structlog

from treecast.services.router.__main__ import main
from treecast.v1 import router_pb2 as pb
from treecast.v1 import router_pb2_grpc
from treecast.wire.channel import open_channel

from ..scripted_verifier import ScriptedVerifier, output_of
from .rig import HELLO, Reply


@asynccontextmanager
async def router_process(*flags: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "treecast.services.router", "--announce", *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def test_process_announces_itself_serves_and_stops_when_told(
    verifier: ScriptedVerifier,
) -> None:
    seeds = f"127.0.0.1:1,{verifier.address}"
    async with router_process("--verifiers", seeds) as process:
        assert process.stdout is not None
        line = json.loads(await process.stdout.readline())
        assert line.keys() == {"role", "address", "metrics", "instance_id", "pid"}
        assert line["role"] == "router"
        async with open_channel(line["address"]) as channel:
            stub: Any = router_pb2_grpc.RouterServiceStub(channel)
            request = pb.GenerateRequest(text="hello", sampling={"max_tokens": 2})
            assert (await Reply(stub.Generate(request)).read_all()).tokens() == output_of(HELLO, 2)
        metrics = await asyncio.to_thread(fetch, f"http://{line['metrics']}/metrics")
        whose = 'model="bytes",outcome="length",tenant="default"'
        assert f"treecast_router_requests_total{{{whose}}} 1.0" in metrics
        process.terminate()
        _, log = await process.communicate()
    assert process.returncode == 0
    assert log.index(b"service.draining") < log.index(b"service.stopped")


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read(), "utf-8")


@pytest.fixture
def _logs_set_back() -> Iterator[None]:
    """A router that starts in this process sets up logs for all of it."""
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.mark.usefixtures("_logs_set_back")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--verifiers", "nowhere"],
            "seed is 'nowhere'; it must be host:port or dns:///name:port, port 1..65535",
        ),
        (["--redis-url", "http://x"], "redis_url is 'http://x': Redis URL must specify one of"),
        (
            ["--queue-limit", "0"],
            "--queue-limit (or TREECAST_QUEUE_LIMIT) is '0': Input should be greater than or equal",
        ),
        (["--colour", "red"], "error parsing CLI: unrecognized arguments: --colour red"),
        (["--log-level", "loud"], "log_level is 'loud'; allowed: debug, info, warning, error"),
    ],
)
def test_router_does_not_start_when_a_setting_is_bad(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    assert capsys.readouterr().err.startswith(f"treecast-router: {message}")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--listen", "cannot listen on BUSY: address already in use"),
        ("--metrics-listen", "metrics_listen BUSY cannot be bound: Address already in use"),
    ],
)
async def test_process_ends_when_an_address_is_in_use(flag: str, message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = f"127.0.0.1:{taken.getsockname()[1]}"
        async with router_process(flag, busy) as process:
            out, log = await process.communicate()
    assert process.returncode == 2
    assert out == b""
    assert log.decode().splitlines()[-1] == f"treecast-router: {message.replace('BUSY', busy)}"


async def test_router_never_loads_torch_or_transformers() -> None:
    check = "import sys, treecast.services.router.server as _; print(*sys.modules)"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", check, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(30):
        out, _ = await process.communicate()
    loaded = set(out.decode().split())
    assert "treecast.services.router.text" in loaded
    assert not {"torch", "transformers"} & loaded
