"""What the router says of itself: models, status, readiness, metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from treecast.errors import InvalidRequest, Unavailable
from treecast.v1 import router_pb2 as pb
from treecast.v1 import verifier_pb2 as verifier_pb
from treecast.wire.frames import Heartbeat
from treecast.wire.registry import Entry

from ..scripted_verifier import ScriptedVerifier, output_of, text_of
from .rig import HELLO, RouterClient, entries, routing


async def test_models_are_listed_with_their_verifiers(start: Callable[..., Any]) -> None:
    verifiers = [
        await start("v1"),
        await start("v2"),
        await start("v3", model="another", model_revision="r7", context_tokens=64),
    ]
    verifiers[2].files = verifier_pb.GetTokenizerResponse()
    async with routing(verifiers) as client:
        answer = await client.stub.ListModels(pb.ListModelsRequest())
        assert list(answer.models) == [
            pb.Model(name="another", revision="r7", vocab_size=258, context_tokens=64, verifiers=1),
            pb.Model(name="bytes", revision="r1", vocab_size=258, context_tokens=512, verifiers=2),
        ]
        with pytest.raises(
            InvalidRequest, match=r"^model is not set and 2 are served: another, bytes$"
        ):
            await client.generate().read_all()
        other = await client.generate(model="another", tokens={"ids": HELLO}).read_all()
        assert other.of("started")[0].model_revision == "r7"
        assert other.text() == ""
        reply = await client.generate(model="bytes").read_all()
        assert reply.text() == text_of(HELLO, 5)


async def test_status_names_every_verifier(start: Callable[..., Any]) -> None:
    verifier = await start()
    verifier.state = Heartbeat(running=2, waiting=1, kv_pages_free=30, kv_pages_total=32)
    async with routing([verifier]) as client:
        client.router.fleet.follow((*entries(verifier), Entry("127.0.0.1:1")))
        status = await client.stub.GetStatus(pb.GetStatusRequest())
        assert list(status.verifiers) == [
            pb.VerifierStatus(address="127.0.0.1:1"),
            pb.VerifierStatus(
                address=verifier.address,
                healthy=True,
                instance_id="v1",
                model="bytes",
                model_revision="r1",
                running=2,
                waiting=1,
                kv_pages_free=30,
                kv_pages_total=32,
                speculators=["s1", "s2"],
                numerics_fingerprint="f1",
            ),
        ]
        assert (status.queued, status.running) == (0, 0)


async def test_router_is_ready_from_its_first_verifier_until_it_drains(
    start: Callable[..., Any],
) -> None:
    one = await start()
    async with routing() as client, asyncio.timeout(10):
        watch = client.health.Watch(
            health_pb2.HealthCheckRequest(service="treecast.v1.RouterService")
        )
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        client.router.fleet.follow(entries(one))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        await one.kill()
        await client.streams(0)
        await client.router.drain()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


async def test_running_requests_finish_and_new_ones_are_refused_when_draining(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.budget = 1
    running = await client.generate().read_tokens(1)
    draining = asyncio.create_task(client.router.drain())
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match=r"^router is draining$"):
        await client.generate().read_all()
    assert not draining.done()
    verifier.allow(10)
    assert (await running.read_all()).tokens() == output_of(HELLO, 5)
    await draining


async def test_metrics_tell_what_was_served(client: RouterClient) -> None:
    for _ in range(2):
        await client.generate().read_all()
    whose = {"tenant": "default", "model": "bytes"}
    assert client.metric("requests_total", outcome="length", **whose) == 2
    assert client.metric("tokens_total", **whose) == 10
    assert client.metric("time_to_first_token_seconds_count", **whose) == 2
    assert client.metric("request_seconds_count", **whose) == 2
    assert client.metric("verifier_streams") == 1
    assert client.metric("running_requests") == 0
