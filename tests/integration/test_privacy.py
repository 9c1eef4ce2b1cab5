"""No prompt, token or key in logs above DEBUG, nor in metrics: a marked request, and a search."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from io import StringIO
from typing import Any

import pytest
import structlog
from prometheus_client import generate_latest

from treecast import AsyncClient, SamplingParams
from treecast.client import RetryPolicy
from treecast.errors import TreecastError
from treecast.services.router import service as router_service
from treecast.services.router.keys import entry_of
from treecast.services.router.messages import Ask, parse_ask
from treecast.telemetry.logs import configure_logs
from treecast.v1 import router_pb2 as pb

from ..byte_tokenizer import BOS
from .router.rig import routing
from .scripted_verifier import ScriptedVerifier, text_of
from .toy_mesh import GREEDY, toy_mesh

MARKER = "xyzzy-plugh"
KEY = "tc_very-secret"
IDS = [83, 71, 83, 71, 83, 71, 83]
OUTPUT_TOKENS = 12

log = structlog.get_logger()


@contextmanager
def logs_at(level: str) -> Iterator[StringIO]:
    """Logs as a service writes them to stderr, kept."""
    kept = StringIO()
    with redirect_stderr(kept):
        configure_logs("test", "test", level, as_json=True)
    try:
        yield kept
    finally:
        structlog.reset_defaults()
        structlog.contextvars.clear_contextvars()


def found(where: str) -> list[str]:
    """What must not be there, of what is."""
    output = text_of((BOS, *MARKER.encode()), OUTPUT_TOKENS)
    secrets = (MARKER, output, KEY, "83, 71, 83", "83 71 83")
    return [secret for secret in secrets if secret in where]


async def send_marked(client: AsyncClient) -> None:
    """Requests that are served, and all that are refused with the marker in what is wrong."""
    sampling = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS)
    chat = [{"role": "user", "content": MARKER}]
    marked: list[dict[str, Any]] = [
        {"prompt": MARKER},
        {"prompt": chat, "session_id": MARKER},
        {"prompt": MARKER, "sampling": SamplingParams(max_tokens=3, stop=(MARKER,))},
        {"prompt": [{"role": MARKER, "content": MARKER}]},
        {"prompt": MARKER, "model": MARKER},
        {"prompt": MARKER, "growth": MARKER},
        {"prompt": MARKER * 100},
        {"prompt": [*IDS, 10**6]},
        {"prompt": MARKER, "timeout_s": 0.0001},
    ]
    for request in marked:
        with suppress(TreecastError):
            await client.generate(**({"sampling": sampling} | request)).result()


async def run_marked() -> str:
    """Over a text model and over the toy mesh; returns all metrics."""
    once, keys = RetryPolicy(attempts_to_start=1), entry_of(KEY, "acme", {})
    async with ScriptedVerifier("v") as verifier, routing([verifier], api_keys=keys) as router:
        for key in (KEY, f"{KEY}-wrong"):
            async with AsyncClient(router.router.address, once, api_key=key) as client:
                await send_marked(client)
        verifier.refusal = TreecastError("the step failed")
        async with AsyncClient(router.router.address, once, api_key=KEY) as client:
            with suppress(TreecastError):
                await client.generate(MARKER).result()
        metrics = generate_latest(router.router.metrics.registry)
    async with toy_mesh() as mesh, mesh.client(retry=once) as client:
        await client.generate(IDS, GREEDY, session_id="s").result()
        with suppress(TreecastError):
            await client.generate([*IDS, 10**6], GREEDY).result()
        metrics += generate_latest(mesh.router.metrics.registry)
        metrics += generate_latest(mesh.verifiers[0].verifier.metrics.registry)
    return metrics.decode()


async def test_nothing_of_a_request_is_in_logs_at_info_or_in_metrics() -> None:
    with logs_at("info") as kept:
        metrics = await run_marked()
    logs = kept.getvalue()
    assert "stream opened" in logs  # they were kept
    assert "request.ended" in logs
    assert found(logs) == []
    assert found(metrics) == []
    assert 'outcome="length"' in metrics


@pytest.mark.parametrize(("level", "seen"), [("info", True), ("warning", False)])
async def test_search_finds_a_prompt_when_it_is_logged(
    level: str, seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: a router that logs what it is asked, at a level that is on or off."""

    def careless(message: pb.GenerateRequest) -> Ask:
        log.info("request", prompt=message.text)
        return parse_ask(message)

    monkeypatch.setattr(router_service, "parse_ask", careless)
    with logs_at(level) as kept:
        await run_marked()
    assert (MARKER in found(kept.getvalue())) is seen
