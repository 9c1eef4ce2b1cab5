"""Out of service and back, and verifiers that fail: through real ports, on the toy engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from treecast import SamplingParams
from treecast.client import AsyncStream, Chunk, RetryPolicy
from treecast.errors import NotServed, TreecastError, Unavailable
from treecast.services.router import fleet
from treecast.wire.channel import open_channel
from treecast.wire.frames import Heartbeat

from .router.rig import HELLO, RouterClient, routing
from .scripted_verifier import ScriptedVerifier, output_of
from .toy_mesh import PROMPT, Mesh, toy_mesh

SLOW = {"toy_step_s": 0.01}
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
ONCE = RetryPolicy(attempts_to_start=1)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def mesh() -> AsyncIterator[Mesh]:
    async with toy_mesh(num_verifiers=2, verifiers=SLOW) as mesh:
        yield mesh


def running(mesh: Mesh) -> dict[str, int]:
    """Requests by verifier, as they are now."""
    return {worker.address: worker.verifier.steps.num_requests for worker in mesh.verifiers}


def holder(mesh: Mesh) -> str:
    """The verifier that runs the only request."""
    [busy] = [address for address, count in running(mesh).items() if count]
    return busy


async def read(stream: AsyncStream, count: int) -> list[Chunk]:
    return [await anext(stream) for _ in range(count)]


def is_draining(mesh: Mesh, address: str) -> bool:
    [verifier] = [one for one in mesh.router.fleet.verifiers if one.address == address]
    return verifier.candidate is not None and verifier.candidate.beat.draining


async def test_running_stream_finishes_and_new_ones_go_elsewhere_when_a_verifier_drains(
    mesh: Mesh,
) -> None:
    async with mesh.client() as client:
        stream = client.generate(PROMPT, LONG, max_nodes=0)
        await read(stream, 2)
        drained = holder(mesh)
        assert await client.drain(drained) == 1
        await mesh.until(lambda: is_draining(mesh, drained))
        news = [client.generate(PROMPT, LONG, max_nodes=0) for _ in range(4)]
        for new in news:
            await read(new, 1)
        assert running(mesh)[drained] == 1
        assert sum(running(mesh).values()) == 5
        results = [await each.result() for each in (stream, *news)]
        assert {result.samples[0].placements for result in results} == {1}
        assert len({result.token_ids for result in results}) == 1


async def test_running_stream_is_handed_over_when_its_time_is_up(mesh: Mesh) -> None:
    async with mesh.client() as client:
        whole = await client.generate(PROMPT, LONG, max_nodes=0).result()
        stream = client.generate(PROMPT, LONG, max_nodes=0, session_id="s")
        chunks = await read(stream, 2)
        drained = holder(mesh)
        await client.drain(drained, hand_over_after_s=0)
        chunks += [chunk async for chunk in stream]
        result = await stream.result()
        assert (result.samples[0].placements, result.resumes) == (2, 0)
        assert [token for chunk in chunks for token in chunk.token_ids] == list(whole.token_ids)


async def test_nothing_is_handed_over_when_the_verifier_is_resumed_before(mesh: Mesh) -> None:
    async with mesh.client() as client:
        stream = client.generate(PROMPT, LONG, max_nodes=0)
        await read(stream, 1)
        drained = holder(mesh)
        await client.drain(drained, hand_over_after_s=0.2)
        await client.resume(drained)
        assert (await stream.result()).samples[0].placements == 1


async def test_verifier_serves_again_when_it_is_resumed() -> None:
    async with toy_mesh() as mesh, mesh.client() as client:
        [worker] = mesh.verifiers
        await client.drain(worker.address)
        await mesh.until(lambda: is_draining(mesh, worker.address))
        assert (await client.status()).verifiers[0].draining
        assert await client.models() == ()
        waiting = asyncio.ensure_future(client.generate(PROMPT, LONG).result())
        await client.resume(mesh.router.fleet.candidates()[0].instance_id)
        assert len((await waiting).token_ids) == LONG.max_tokens


async def health_of(address: str) -> int:
    async with open_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int((await stub.Check(health_pb2.HealthCheckRequest())).status)  # type: ignore[misc]


async def test_router_drains_and_resumes(mesh: Mesh) -> None:
    async with mesh.client(retry=ONCE) as client:
        stream = client.generate(PROMPT, LONG, max_nodes=0)
        await read(stream, 1)
        assert await client.drain() == 1
        assert await health_of(mesh.address) == NOT_SERVING
        assert (await client.status()).draining
        with pytest.raises(Unavailable, match=r"router is draining$"):
            await client.generate(PROMPT, LONG).result()
        assert len((await stream.result()).token_ids) == LONG.max_tokens
        await client.resume()
        assert (await client.generate(PROMPT, LONG).result()).token_ids
        assert await health_of(mesh.address) == SERVING


async def test_unknown_verifier_is_refused_by_name(mesh: Mesh) -> None:
    async with mesh.client() as client:
        for call in (client.drain("nobody"), client.resume("nobody")):
            with pytest.raises(NotServed, match=r"^no verifier 'nobody' answers; dialed: 127"):
                await call


# --- a sick verifier ----------------------------------------------------------------------------


async def fail_all(client: RouterClient, sick: ScriptedVerifier) -> int:
    """Send one request after the other; returns how many the sick one was given."""
    for _ in range(20):
        try:
            await client.generate().read_all()
        except TreecastError as error:
            assert error.message == "the step failed"  # noqa: PT017
    return len(sick.started)


@pytest.mark.parametrize(("threshold", "given"), [(5, 5), (10**6, 20)])
async def test_sick_verifier_is_left_alone_after_five_failures(
    monkeypatch: pytest.MonkeyPatch, threshold: int, given: int
) -> None:
    """It fails at once, so it is always the least loaded: without a breaker it takes them all."""
    monkeypatch.setattr(fleet, "BREAKER_THRESHOLD", threshold)
    monkeypatch.setattr(fleet, "BREAKER_PAUSE_S", 3600.0)
    async with ScriptedVerifier("sick") as sick, ScriptedVerifier("well") as well:
        sick.refusal = TreecastError("the step failed")
        well.state = Heartbeat(running=5)
        async with routing([sick, well]) as client:
            await client.router.fleet.until(lambda: is_busy(client) or None, 10)
            assert await fail_all(client, sick) == given
            assert len(well.started) == 20 - given


def is_busy(client: RouterClient) -> bool:
    return {one.beat.running for one in client.router.fleet.candidates()} == {0, 5}


async def test_sick_verifier_is_tried_again_by_one_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet, "BREAKER_PAUSE_S", 0.3)
    async with ScriptedVerifier("sick") as verifier, routing([verifier]) as client:
        verifier.refusal = TreecastError("the step failed")
        for _ in range(5):
            with pytest.raises(TreecastError, match="the step failed"):
                await client.generate().read_all()
        verifier.refusal, verifier.budget = None, 0
        waiting = [client.generate() for _ in range(3)]
        await verifier.until(lambda: len(verifier.started) == 6)  # the trial
        await client.queued(2)
        verifier.allow(100)
        for reply in waiting:
            assert (await reply.read_all()).tokens() == output_of(HELLO, 5)
