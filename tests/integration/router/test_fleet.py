"""Which verifiers the router knows, and which of them it gives a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from treecast.wire.frames import Heartbeat, Role
from treecast.wire.guarded_redis import GuardedRedis
from treecast.wire.registry import Entry, Registration

from ..scripted_verifier import ScriptedVerifier, output_of
from .rig import HELLO, RouterClient, entries, routing


async def test_requests_go_to_the_least_loaded_verifier(start: Callable[..., Any]) -> None:
    one, two = await start("v1", budget=0), await start("v2", budget=0)
    async with routing([one, two]) as client:
        replies = []
        for _ in range(4):
            replies.append(client.generate())
            await replies[-1].read(lambda reply: bool(reply.of("started")))
        for verifier in (one, two):  # clients are told of a placement before the verifier is
            await verifier.until(lambda verifier=verifier: len(verifier.started) == 2)
        assert client.metric("placements_total", by="load") == 4
        one.allow(100)
        two.allow(100)
        for reply in replies:
            await reply.read_all()


async def test_draining_verifier_gets_nothing_new_and_finishes_what_it_has(
    start: Callable[..., Any],
) -> None:
    one = await start("v1", budget=1)
    async with routing([one]) as client:
        running = await client.generate().read_tokens(1)
        one.state = Heartbeat(draining=True)
        fleet = client.router.fleet
        assert await fleet.until(lambda: not fleet.open_hellos() or None, 10)
        two = await start("v2")
        client.router.fleet.follow(entries(one, two))
        assert (await client.generate().read_all()).tokens() == output_of(HELLO, 5)
        one.allow(10)
        await running.read_all()
        assert (len(one.started), len(two.started)) == (1, 1)
        assert running.finished.placements == 1


async def test_one_stream_is_kept_when_a_verifier_is_listed_by_two_names(
    verifier: ScriptedVerifier,
) -> None:
    port = verifier.address.rpartition(":")[2]
    async with routing([verifier]) as client:
        client.router.fleet.follow((*entries(verifier), Entry(f"localhost:{port}")))
        fleet = client.router.fleet
        assert await fleet.until(
            lambda: [one.address for one in fleet.verifiers] == [f"localhost:{port}"] or None, 10
        )
        await client.streams(1)
        assert (await client.generate().read_all()).tokens() == output_of(HELLO, 5)
        await verifier.kill()
        await client.streams(0)
        assert {one.address for one in fleet.verifiers} == {verifier.address, f"localhost:{port}"}


async def test_verifier_is_kept_while_it_answers_when_it_is_not_listed_any_more(
    start: Callable[..., Any],
) -> None:
    one = await start("v1")
    async with routing([one]) as client:
        fleet = client.router.fleet
        fleet.follow(())
        assert (await client.generate().read_all()).tokens() == output_of(HELLO, 5)
        await one.kill()
        await client.streams(0)
        assert fleet.verifiers == []


async def test_address_is_given_up_when_it_is_not_listed_any_more_and_does_not_answer() -> None:
    async with routing() as client:
        fleet = client.router.fleet
        fleet.follow((Entry("127.0.0.1:1"),))
        assert [one.address for one in fleet.verifiers] == ["127.0.0.1:1"]
        fleet.follow(())
        assert fleet.verifiers == []


async def test_requests_that_the_heartbeat_counts_are_not_counted_again(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.budget = 1
    verifier.state = Heartbeat(running=7)
    fleet = client.router.fleet
    reply = await client.generate().read_tokens(1)
    # Seven elsewhere and ours, as the verifier says from its next heartbeat on.
    verifier.state = Heartbeat(running=8)
    assert await fleet.until(lambda: fleet.candidates()[0].beat.running == 8 or None, 10)
    assert [candidate.load for candidate in fleet.candidates()] == [8]
    verifier.allow(10)
    await reply.read_all()


async def test_verifiers_are_found_through_redis(
    start: Callable[..., Any], empty_redis: str
) -> None:
    verifier = await start()
    redis = GuardedRedis(empty_redis)
    registration = Registration(redis, Role.VERIFIER, verifier.address, "v1")
    await registration.start()
    async with routing([], empty_redis) as client:
        await client.streams(1)
        assert (await client.generate().read_all()).tokens() == output_of(HELLO, 5)
    await registration.close()
    await redis.close()
