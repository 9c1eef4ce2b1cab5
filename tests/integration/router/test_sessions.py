"""Where sessions live: leases in Redis, and rendezvous hashing without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from treecast.errors import StaleLease
from treecast.v1 import router_pb2 as pb

from ...conftest import LocalRedis
from ..scripted_verifier import ScriptedVerifier, output_of
from .rig import HELLO, RouterClient, routing


async def test_second_turn_comes_to_the_same_verifier_through_another_router(
    start: Callable[..., Any], empty_redis: str
) -> None:
    verifiers = [await start(f"v{number}") for number in range(4)]
    async with routing(verifiers, empty_redis) as first, routing(verifiers, empty_redis) as second:
        for session in ("a", "b", "c"):
            for client in (first, second, first):
                await client.generate(session_id=session).read_all()
        homes = {
            session: {
                each.hello.instance_id
                for each in verifiers
                for start in each.started
                if start.session.session_id == session
            }
            for session in ("a", "b", "c")
        }
        assert {len(home) for home in homes.values()} == {1}
        keys = {start.session for each in verifiers for start in each.started}
        assert len(keys) == 3  # one epoch per session, since none moved
        assert first.metric("placements_total", by="affinity") == 3
        assert second.metric("placements_total", by="affinity") == 3
        assert first.router.redis_ok


async def test_epoch_grows_when_a_session_moves_after_a_loss(
    start: Callable[..., Any], empty_redis: str
) -> None:
    verifiers = [await start("v1", budget=2), await start("v2", budget=2)]
    async with routing(verifiers, empty_redis) as client:
        reply = await client.generate(session_id="s").read_tokens(2)
        first, second = verifiers if verifiers[0].started else verifiers[::-1]
        await first.kill()
        second.allow(100)
        await reply.read_all()
        await client.generate(session_id="s").read_all()
        before, after = first.started[0].session, second.started[0].session
        assert before is not None
        assert after is not None
        assert after.epoch > before.epoch
        assert second.started[1].session == after


async def test_request_claims_a_newer_epoch_when_its_own_is_stale(
    start: Callable[..., Any], empty_redis: str
) -> None:
    verifier = await start(capacity=1)
    plainly = verifier.run

    async def refuse_first(link: Any, start: Any) -> None:
        verifier.run = plainly
        verifier.fail(start.handle, StaleLease("session lease has epoch 1; 2 has been seen"))

    async with routing([verifier], empty_redis) as client:
        await client.generate(session_id="s").read_all()
        verifier.run = refuse_first
        reply = await client.generate(session_id="s").read_all()
        assert reply.tokens() == output_of(HELLO, 5)
        assert reply.finished.placements == 1
        epochs = [start.session.epoch for start in verifier.started if start.session]
        assert epochs[0] == epochs[1] < epochs[2]


async def test_stale_lease_is_told_when_claiming_again_does_not_help(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.refusal = StaleLease("session lease has epoch 1; 2 has been seen")
    with pytest.raises(StaleLease, match="has been seen"):
        await client.generate(session_id="s").read_all()
    assert len(verifier.started) == 4


async def test_session_is_forgotten_where_it_lived_when_it_is_closed(
    start: Callable[..., Any], empty_redis: str
) -> None:
    verifiers = [await start("v1"), await start("v2")]
    async with routing(verifiers, empty_redis) as client:
        await client.generate(session_id="s").read_all()
        [home] = [each for each in verifiers if each.started]
        closed = await client.stub.CloseSession(pb.CloseSessionRequest(session_id="s"))
        assert closed.closed
        await home.until(lambda: bool(home.forgotten))
        assert [forget.session for forget in home.forgotten] == [home.started[0].session]
        again = await client.stub.CloseSession(pb.CloseSessionRequest(session_id="s"))
        assert not again.closed


@pytest.mark.parametrize("url", [None, "redis://127.0.0.1:1"], ids=["none", "unreachable"])
async def test_sessions_are_placed_by_hash_when_there_is_no_redis(
    start: Callable[..., Any], url: str | None
) -> None:
    verifiers = [await start(f"v{number}") for number in range(3)]
    async with routing(verifiers, url) as first, routing(verifiers, url) as second:
        for client in (first, second, first):
            await client.generate(session_id="s").read_all()
        [home] = [each for each in verifiers if each.started]
        epochs = [start.session.epoch for start in home.started if start.session]
        assert epochs == sorted(epochs)
        assert first.metric("placements_total", by="rendezvous") == 2
        assert not first.router.redis_ok
        redis_up = first.router.metrics.registry.get_sample_value("treecast_redis_up")
        assert redis_up == (0 if url else None)
        status = await first.stub.GetStatus(pb.GetStatusRequest())
        assert not status.redis_ok
        closed = await first.stub.CloseSession(pb.CloseSessionRequest(session_id="s"))
        assert closed.closed
        for each in verifiers:
            await each.until(lambda each=each: len(each.forgotten) == 1)  # type: ignore[misc]
        assert home.forgotten[0].session.epoch >= epochs[-1]


async def test_requests_are_served_when_redis_dies(
    start: Callable[..., Any], own_redis: LocalRedis
) -> None:
    verifiers = [await start("v1"), await start("v2")]
    async with routing(verifiers, own_redis.url) as client:
        await client.generate(session_id="s").read_all()
        assert (await client.stub.GetStatus(pb.GetStatusRequest())).redis_ok
        own_redis.kill()
        for _ in range(3):
            reply = await client.generate(session_id="s").read_all()
            assert reply.tokens() == output_of(HELLO, 5)
        status = await client.stub.GetStatus(pb.GetStatusRequest())
        assert not status.redis_ok
        assert client.router.metrics.registry.get_sample_value("treecast_redis_up") == 0
