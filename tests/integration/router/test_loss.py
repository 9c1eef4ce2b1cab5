"""What becomes of a request whose verifier is lost or hands it over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from treecast.errors import HandedOver, Unavailable
from treecast.v1 import verifier_pb2 as verifier_pb
from treecast.wire.frames import Completed, Cost, FinishReason, Heartbeat, Progress, Usage

from ..scripted_verifier import FOREVER, output_of, text_of
from .rig import HELLO, entries, routing


async def test_stream_goes_on_unchanged_when_its_verifier_is_lost(
    start: Callable[..., Any],
) -> None:
    one, two = await start("v1", budget=3), await start("v2", budget=3)
    async with routing([one, two]) as client:
        reply = await client.generate(sampling={"max_tokens": 8, "seed": 7}).read_tokens(3)
        first, second = (one, two) if one.started else (two, one)
        await first.kill()
        await reply.read_tokens(6)
        assert second.started[0].committed == tuple(output_of(HELLO, 3))
        second.allow(100)
        await reply.read_all()
        assert reply.tokens() == output_of(HELLO, 8)
        assert reply.text() == text_of(HELLO, 8)
        assert len(reply.of("started")) == 1
        assert (reply.finished.placements, reply.finished.same_numerics) == (2, True)
        before, after = first.started[0], second.started[0]
        assert after == replace(before, handle=after.handle, committed=after.committed)
        assert after.handle != before.handle
        assert client.metric("replacements_total", why="lost") == 1


async def test_usage_adds_up_over_placements_when_a_verifier_is_lost(
    start: Callable[..., Any],
) -> None:
    async def three_in_two_steps(link: Any, start: Any) -> None:
        link.send(Progress(start.handle, 0, (97,), cost=Cost(1, 5, 0)))
        link.send(Progress(start.handle, 1, (98, 99), cost=Cost(1, 7, 1)))

    async def the_rest(link: Any, start: Any) -> None:
        usage = Usage(6, 4, 5, steps=1, drafted=3, accepted=1)
        link.send(Progress(start.handle, 3, (100, 101), cost=Cost(1, 3, 1)))
        link.send(Completed(start.handle, FinishReason.LENGTH, usage))

    one = await start("v1")
    one.run = three_in_two_steps
    async with routing([one]) as client:
        reply = await client.generate().read_tokens(3)
        two = await start("v2")
        two.run = the_rest
        client.router.fleet.follow(entries(one, two))
        await client.streams(2)
        await one.kill()
        await reply.read_all()
    assert reply.finished.usage == verifier_pb.Usage(
        prompt_tokens=6, cached_tokens=4, output_tokens=5, steps=3, drafted=15, accepted=2
    )


async def test_text_is_seamless_when_a_verifier_is_lost_within_a_character(
    start: Callable[..., Any],
) -> None:
    euro = "€".encode()

    async def two_bytes(link: Any, start: Any) -> None:
        link.send(Progress(start.handle, 0, tuple(euro[:2])))

    async def the_third(link: Any, start: Any) -> None:
        link.send(Progress(start.handle, 2, (euro[2],)))
        link.send(Completed(start.handle, FinishReason.LENGTH))

    one = await start("v1")
    one.run = two_bytes
    async with routing([one]) as client:
        reply = await client.generate().read_tokens(2)
        assert reply.text() == ""
        two = await start("v2")
        two.run = the_third
        client.router.fleet.follow(entries(one, two))
        await client.streams(2)
        await one.kill()
        assert (await reply.read_all()).text() == "€"


async def test_request_waits_for_a_new_verifier_when_the_only_one_is_lost(
    start: Callable[..., Any],
) -> None:
    one = await start("v1", budget=2)
    async with routing([one]) as client:
        reply = await client.generate().read_tokens(2)
        await one.kill()
        await client.queued(1)
        two = await start("v2")
        client.router.fleet.follow(entries(two))
        assert (await reply.read_all()).tokens() == output_of(HELLO, 5)


async def test_request_goes_back_to_its_verifier_when_that_has_returned(
    start: Callable[..., Any],
) -> None:
    one = await start("v1", budget=2)
    async with routing([one]) as client:
        reply = await client.generate().read_tokens(2)
        one.allow(FOREVER)
        one.hang_up()
        finished = (await reply.read_all()).finished
    assert reply.tokens() == output_of(HELLO, 5)
    assert finished.placements == 2


async def test_request_goes_first_and_is_not_refused_when_it_lost_its_verifier(
    start: Callable[..., Any],
) -> None:
    one = await start("v1", capacity=1, budget=2)
    async with routing([one], queue_limit=1) as client:
        lost = await client.generate(request_id="lost").read_tokens(2)
        waiting = client.generate(request_id="waiting", priority=10)
        await client.queued(1)
        await one.kill()
        await client.queued(2)
        two = await start("v2", capacity=1)
        client.router.fleet.follow(entries(two))
        assert (await lost.read_all()).tokens() == output_of(HELLO, 5)
        await waiting.read_all()
        assert [start.request_id for start in two.started] == ["lost", "waiting"]


async def test_every_request_ends_unavailable_when_all_verifiers_are_lost(
    start: Callable[..., Any],
) -> None:
    one = await start("v1", budget=2)
    async with routing([one], verifier_grace_s=0.2) as client:
        reply = await client.generate().read_tokens(2)
        await one.kill()
        for each in (reply, client.generate(), client.generate(model="bytes")):
            with pytest.raises(Unavailable, match=r"; waited 0\.2 s$") as refusal:
                await each.read_all()
            assert refusal.value.retry_after_s == 1.0
        assert client.metric("running_requests") == 0


async def test_result_says_so_when_the_stream_went_on_with_other_numerics(
    start: Callable[..., Any],
) -> None:
    one = await start("v1", budget=2)
    async with routing([one]) as client:
        reply = await client.generate().read_tokens(2)
        two = await start("v2", fingerprint="f2")
        client.router.fleet.follow(entries(one, two))
        await client.streams(2)
        await one.kill()
        await reply.read_all()
        assert reply.tokens() == output_of(HELLO, 5)
        assert (reply.finished.placements, reply.finished.same_numerics) == (2, False)


async def test_stream_goes_on_with_equal_numerics_when_they_can_be_had(
    start: Callable[..., Any],
) -> None:
    one = await start("v1", budget=2)
    async with routing([one]) as client:
        reply = await client.generate().read_tokens(2)
        idle, busy = await start("v2", fingerprint="f2"), await start("v3")
        busy.state = Heartbeat(running=5)
        client.router.fleet.follow(entries(one, idle, busy))
        await client.streams(3)
        await one.kill()
        assert (await reply.read_all()).tokens() == output_of(HELLO, 5)
        assert (len(idle.started), len(busy.started)) == (0, 1)
        assert reply.finished.same_numerics


async def test_request_moves_when_its_verifier_hands_it_over(start: Callable[..., Any]) -> None:
    one, two = await start("v1"), await start("v2")

    async def hand_over(link: Any, start: Any) -> None:
        link.send(Progress(start.handle, 0, tuple(output_of(HELLO, 2))))
        verifiers[0].fail(start.handle, HandedOver("draining"))

    async with routing([one, two]) as client:
        verifiers = [one, two]
        first = await client.generate(request_id="r").read_all()
        if not one.started:
            verifiers.reverse()
        verifiers[0].run = hand_over
        reply = await client.generate(request_id="r").read_all()
        assert reply.tokens() == first.tokens() == output_of(HELLO, 5)
        assert reply.finished.placements == 2
        assert client.metric("replacements_total", why="handed_over") == 1


async def test_request_fails_when_it_has_cost_too_many_verifiers(
    start: Callable[..., Any],
) -> None:
    verifiers = [await start(f"v{number}") for number in range(3)]
    for each in verifiers:
        each.refusal = Unavailable("dying")
    async with routing(verifiers, max_placements=2) as client:
        with pytest.raises(Unavailable, match=r"^request lost 2 verifiers; the limit is 2$"):
            await client.generate().read_all()
