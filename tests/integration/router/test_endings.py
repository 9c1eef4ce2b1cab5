"""Who ends a request: the client, its deadline, a sample that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from treecast.errors import Cancelled, DeadlineExceeded, InvalidRequest
from treecast.v1 import router_pb2 as pb

from ..scripted_verifier import ScriptedVerifier, output_of
from .rig import HELLO, RouterClient, routing


async def test_verifier_is_told_at_once_when_the_client_is_gone(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.budget = 2
    reply = await client.generate().read_tokens(2)
    reply.call.cancel()
    await verifier.until(lambda: bool(verifier.cancelled))
    assert verifier.cancelled == [verifier.started[0].handle]
    verifier.allow(5)
    assert (await client.generate().read_all()).tokens() == output_of(HELLO, 5)
    assert client.metric("requests_total", outcome="client_gone") == 1
    assert client.metric("running_requests") == 0


async def test_verifier_is_told_when_a_request_is_aborted(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.budget = 1
    reply = await client.generate(request_id="r").read_tokens(1)
    assert (await client.stub.Abort(pb.AbortRequest(request_id="r"))).aborted
    with pytest.raises(Cancelled, match=r"^request 'r' was aborted$"):
        await reply.read_all()
    await verifier.until(lambda: bool(verifier.cancelled))
    assert verifier.cancelled == [verifier.started[0].handle]
    assert not (await client.stub.Abort(pb.AbortRequest(request_id="r"))).aborted


async def test_request_leaves_the_queue_when_it_is_aborted(start: Callable[..., Any]) -> None:
    verifier = await start(capacity=1, budget=1)
    async with routing([verifier]) as client:
        first = await client.generate().read_tokens(1)
        waiting = client.generate(request_id="r")
        await client.queued(1)
        assert (await client.stub.Abort(pb.AbortRequest(request_id="r"))).aborted
        with pytest.raises(Cancelled, match=r"^request 'r' was aborted$"):
            await waiting.read_all()
        await client.queued(0)
        verifier.allow(4)
        await first.read_all()
        assert len(verifier.started) == 1


async def test_many_samples_get_their_room_when_single_requests_keep_coming(
    start: Callable[..., Any],
) -> None:
    verifier = await start(capacity=2, budget=1)
    async with routing([verifier]) as client:
        first = await client.generate(request_id="first").read_tokens(1)
        samples = client.generate(request_id="samples", num_samples=2)
        await client.queued(1)
        late = client.generate(request_id="late")
        await client.queued(2)  # though there is a place for it
        verifier.allow(64)
        await asyncio.gather(first.read_all(), samples.read_all(), late.read_all())
    order = [one.request_id.partition("/")[0] for one in verifier.started]
    assert order == ["first", "samples", "samples", "late"]


async def test_all_samples_are_cancelled_when_one_fails(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.budget = 0
    reply = client.generate(num_samples=3)
    await verifier.until(lambda: len(verifier.started) == 3)
    handles = [start.handle for start in verifier.started]
    verifier.fail(handles[1], InvalidRequest("no"))
    with pytest.raises(InvalidRequest, match=r"^no$"):
        await reply.read_all()
    await verifier.until(lambda: len(verifier.cancelled) == 2)
    assert sorted(verifier.cancelled) == [handles[0], handles[2]]


async def test_verifier_learns_how_much_time_is_left(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    await client.generate(timeout=60).read_all()
    left_ms = verifier.started[0].deadline_ms
    assert left_ms is not None
    assert 30_000 < left_ms < 60_000


async def test_request_ends_in_the_queue_when_its_deadline_passes(
    start: Callable[..., Any],
) -> None:
    verifier = await start(capacity=1, budget=1)
    async with routing([verifier], deadline_margin_s=0.7) as client:
        first = await client.generate().read_tokens(1)
        with pytest.raises(
            DeadlineExceeded, match=r"^deadline passed while the request waited for a verifier$"
        ):
            await client.generate(timeout=1.0).read_all()
        assert client.metric("queue_requests") == 0
        verifier.allow(4)
        await first.read_all()
        assert len(verifier.started) == 1


async def test_request_ends_when_its_deadline_passes_before_any_verifier_is_there() -> None:
    async with routing(deadline_margin_s=0.7) as client:
        with pytest.raises(
            DeadlineExceeded, match=r"^deadline passed while the request waited for a verifier$"
        ):
            await client.generate(timeout=1.0).read_all()
