"""Spans of one request over four servers, as a real collector receives them."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    TraceFlags,
    use_span,
)

from treecast.client import AsyncClient, Client, SamplingParams
from treecast.errors import InvalidRequest, SettingsError
from treecast.services.local import LocalMesh, MeshSettings
from treecast.services.router.settings import RouterSettings

from .otlp_receiver import Received, Receiver, receiving
from .toy_mesh import byte_mesh

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
PROMPT = "xyzzy plugh"
CALLER = SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
UNSAMPLED = SpanContext(0xABD, 0xDEF, is_remote=False, trace_flags=TraceFlags(0))


@dataclass(frozen=True)
class Documented:
    """A row of the table in docs/traces.md."""

    parent: str | None
    attributes: set[str]


def documented() -> dict[tuple[str, str], Documented]:
    """By service and name."""
    page = (Path(__file__).parents[2] / "docs" / "traces.md").read_text()
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `treecast.")]
    found = {}
    for name, service, below, _, attributes in rows:
        parent = below.strip(" `")
        found[service.strip(), name.strip(" `")] = Documented(
            parent if parent.startswith("treecast.") else None,
            set(re.findall("`(.*?)`", attributes)),
        )
    return found


DOCUMENTED = documented()


def key(span: Received) -> tuple[str, str]:
    return span.service.removeprefix("treecast-"), span.name


async def traced_request(receiver: Receiver, caller: SpanContext | None = CALLER) -> str:
    """Run one request through a mesh that traces; returns its text."""
    async with (
        byte_mesh(otlp_endpoint=receiver.endpoint) as address,
        AsyncClient(address) as client,
    ):
        if caller is None:
            return (await client.generate(PROMPT, GREEDY).result()).text
        with use_span(NonRecordingSpan(caller)):
            return (await client.generate(PROMPT, GREEDY).result()).text


async def test_spans_nest_in_one_trace_when_a_request_crosses_four_servers():
    async with receiving() as receiver:
        await traced_request(receiver)
    check_nesting(receiver)
    assert {span.instance for span in receiver.named("treecast.draft")} == {
        "speculator-0",
        "speculator-1",
    }


def check_nesting(receiver: Receiver) -> None:
    """All kinds of spans are there, each below the one that it should be below."""
    spans = {span.span_id: span for span in receiver.spans}
    assert {span.trace_id for span in receiver.spans} == {f"{CALLER.trace_id:032x}"}
    assert {key(span) for span in receiver.spans} == set(DOCUMENTED)
    for span in receiver.spans:
        parent = spans.get(span.parent_id)
        assert (parent.name if parent else None) == DOCUMENTED[key(span)].parent
        assert span.began_ns <= span.ended_ns
        if parent is not None:
            assert parent.began_ns - 10_000_000 <= span.began_ns
    [request] = receiver.named("treecast.request")
    assert request.parent_id == f"{CALLER.span_id:016x}"


async def test_attributes_are_as_documented_and_hold_no_text_when_a_request_is_told():
    async with receiving() as receiver:
        text = await traced_request(receiver)
    for span in receiver.spans:
        assert set(span.attributes) == DOCUMENTED[key(span)].attributes
    [request] = receiver.named("treecast.request")
    assert request.attributes["gen_ai.usage.output_tokens"] == 40
    assert request.attributes["treecast.outcome"] == "length"
    told = json.dumps([span.attributes for span in receiver.spans])
    assert PROMPT not in told
    assert json.dumps(text) not in told


async def test_spans_are_few_when_steps_are_many():
    async with receiving() as receiver:
        await traced_request(receiver)
    [serve] = receiver.named("treecast.serve")
    steps = [span.attributes["treecast.step"] for span in receiver.named("treecast.step")]
    assert steps == [n for n in (1, 2, 4, 8, 16, 32) if n <= serve.attributes["treecast.steps"]]
    drafts = [span.attributes["treecast.draft"] for span in receiver.named("treecast.draft")]
    assert set(drafts) <= {1, 2, 4, 8, 16, 32}


async def test_a_request_is_a_trace_of_its_own_when_the_caller_has_none():
    async with receiving() as receiver:
        await traced_request(receiver, None)
    assert len({span.trace_id for span in receiver.spans}) == 1
    [request] = receiver.named("treecast.request")
    assert request.parent_id == ""


async def test_nothing_is_told_when_the_caller_does_not_sample():
    async with receiving() as receiver:
        await traced_request(receiver, UNSAMPLED)
    assert receiver.spans == []


async def test_a_span_says_why_when_a_request_is_refused():
    async with receiving() as receiver:
        mesh = byte_mesh((), otlp_endpoint=receiver.endpoint)
        async with mesh as address, AsyncClient(address) as client:
            with pytest.raises(InvalidRequest):
                await client.generate([9999], GREEDY).result()
    [request] = receiver.named("treecast.request")
    assert request.failed
    assert request.attributes == {"treecast.outcome": "invalid_request"}


async def test_requests_are_served_when_the_collector_is_gone():
    gone = "http://127.0.0.1:1"
    async with byte_mesh((), otlp_endpoint=gone) as address, AsyncClient(address) as client:
        assert (await client.generate(PROMPT, GREEDY).result()).usage.output_tokens == 40


async def test_the_trace_passes_through_when_only_speculators_trace():
    async with receiving() as receiver:
        mesh = byte_mesh(speculators={"otlp_endpoint": receiver.endpoint})
        async with mesh as address, AsyncClient(address) as client:
            with use_span(NonRecordingSpan(CALLER)):
                await client.generate(PROMPT, GREEDY).result()
    assert {span.name for span in receiver.spans} == {"treecast.draft"}
    assert {span.parent_id for span in receiver.spans} == {f"{CALLER.span_id:016x}"}


@pytest.mark.slow
async def test_spans_nest_in_one_trace_when_the_services_are_processes(tmp_path: Path):
    def run(settings: MeshSettings) -> None:
        span = use_span(NonRecordingSpan(CALLER))
        with LocalMesh(settings) as mesh, Client(mesh.router_address) as client, span:
            client.generate([5, 6, 7, 5, 6], GREEDY).result()

    async with receiving() as receiver:
        settings = MeshSettings(
            engine="toy",
            torch_threads=1,
            log_dir=tmp_path,
            planner="full",
            otlp_endpoint=receiver.endpoint,
        )
        await asyncio.to_thread(run, settings)
    check_nesting(receiver)
    assert len({span.instance for span in receiver.spans}) == 4


_OFF = """
import asyncio, sys
sys.modules["opentelemetry"] = None  # whoever imports it fails

from tests.integration.toy_mesh import byte_mesh
from treecast.client import AsyncClient, SamplingParams
from treecast.telemetry import traces

def refuse(*args):
    raise AssertionError("a span was made")

traces.NoTracing.record = refuse

async def main():
    async with byte_mesh() as address, AsyncClient(address) as client:
        stream = client.generate("a b c", SamplingParams(temperature=0, max_tokens=40))
        assert (await stream.result()).usage.accepted > 0

asyncio.run(main())
print([name for name in sys.modules if name.startswith("opentelemetry.")])
"""


def test_opentelemetry_is_not_imported_when_tracing_is_off():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _OFF], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("endpoint", ["localhost:4317", "grpc://a:1", "http://a:1/v1/traces"])
def test_an_endpoint_is_refused_by_name_when_it_is_none(endpoint: str):
    with pytest.raises(SettingsError, match=r"--otlp-endpoint \(or TREECAST_OTLP_ENDPOINT\)"):
        RouterSettings.load(["--otlp-endpoint", endpoint], "treecast-router")
