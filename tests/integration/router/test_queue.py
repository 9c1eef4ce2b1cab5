"""Who waits for a verifier, in which order, and for how long an output."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest

from treecast.errors import Overloaded
from treecast.services.router.dispatch import Dispatcher
from treecast.services.router.metrics import RouterMetrics
from treecast.services.router.placement import Wanted
from treecast.services.router.queue import Share
from treecast.v1 import router_pb2 as pb

from ..scripted_verifier import output_of
from .rig import HELLO, routing

FULL = r"^queue has 2 requests, 2 of them of tenant 'default'; the limit is 2$"


async def test_requests_wait_and_go_by_priority_when_verifiers_are_full(
    start: Callable[..., Any],
) -> None:
    verifier = await start(capacity=1, budget=1)
    async with routing([verifier]) as client:
        replies = [await client.generate(request_id="first").read_tokens(1)]
        for count, (name, priority) in enumerate([("low", -1), ("plain", 0), ("high", 5)], 1):
            replies.append(client.generate(request_id=name, priority=priority))
            await client.queued(count)
        status = await client.stub.GetStatus(pb.GetStatusRequest())
        assert (status.queued, status.running) == (3, 1)
        verifier.allow(100)
        for reply in replies:
            assert (await reply.read_all()).tokens() == output_of(HELLO, 5)
        order = [start.request_id for start in verifier.started]
        assert order == ["first", "high", "plain", "low"]
        waited = {
            p: client.metric("queue_wait_seconds_count", priority=p) for p in ("-1", "0", "5")
        }
        assert waited == {"-1": 1, "0": 2, "5": 1}


async def test_verifier_is_told_how_long_the_output_may_be(start: Callable[..., Any]) -> None:
    """By what the last one to the same prompt came to, and the metrics say how far off it was."""
    verifier = await start()
    async with routing([verifier]) as client:
        for max_tokens in (5, 7):
            await client.generate(sampling={"max_tokens": max_tokens}).read_all()
        assert [start.expected_tokens for start in verifier.started] == [5, 5]
        for source in ("limit", "typical"):
            assert client.metric("length_guesses_total", source=source) == 1
        assert client.metric("length_error_doublings_sum", source="limit") == 0
        off = client.metric("length_error_doublings_sum", source="typical")
        assert off == pytest.approx(math.log2(7 / 5))


async def test_verifier_is_told_nothing_when_nobody_guesses(start: Callable[..., Any]) -> None:
    verifier = await start()
    async with routing([verifier], length_predictor="none") as client:
        await client.generate().read_all()
        assert [start.expected_tokens for start in verifier.started] == [None]


async def test_guess_grows_when_a_verifier_is_lost_after_more_tokens(
    start: Callable[..., Any],
) -> None:
    one, two = await start("v1"), await start("v2")
    async with routing([one, two]) as client:
        await client.generate(sampling={"max_tokens": 4}).read_all()
        one.started.clear(), two.started.clear()
        one.budget = two.budget = 6
        reply = await client.generate(sampling={"max_tokens": 20}).read_tokens(6)
        lost, other = (one, two) if one.started else (two, one)
        await lost.kill()
        other.allow(100)
        await reply.read_all()
        assert lost.started[-1].expected_tokens == 4
        assert other.started[-1].expected_tokens == 12


async def test_shorter_requests_go_first_when_the_queue_is_told_to(
    start: Callable[..., Any],
) -> None:
    verifier = await start(capacity=1, budget=1)
    settings = {"queue_order": "shortest", "length_predictor": "max-tokens"}
    async with routing([verifier], queue_give_way_s=100, **settings) as client:
        replies = [await client.generate(request_id="first").read_tokens(1)]
        for name, length in (("long", 30), ("short", 2), ("middle", 9)):
            replies.append(client.generate(request_id=name, sampling={"max_tokens": length}))
            await client.queued(len(replies) - 1)
        verifier.allow(100)
        for reply in replies:
            await reply.read_all()
        order = [start.request_id for start in verifier.started]
        assert order == ["first", "short", "middle", "long"]


async def test_place_is_given_back_when_its_request_is_cancelled_as_it_comes(
    start: Callable[..., Any],
) -> None:
    verifier = await start(capacity=1)
    async with routing([verifier]) as client:
        fleet = client.router.fleet
        dispatcher = Dispatcher(fleet, 10, 10.0, RouterMetrics())
        wanted = Wanted("bytes", "r1", "r")
        [seat] = await dispatcher.admit(wanted, Share("t"), None)
        waiting = asyncio.create_task(dispatcher.admit(wanted, Share("t"), None))
        await asyncio.sleep(0)
        assert dispatcher.num_waiting == 1
        seat.leave()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert [candidate.free for candidate in fleet.candidates()] == [1]


async def test_tenant_pays_nothing_when_its_request_is_cancelled_as_its_seat_comes(
    start: Callable[..., Any],
) -> None:
    verifier = await start(capacity=1)
    async with routing([verifier]) as client:
        dispatcher = Dispatcher(client.router.fleet, 10, 10.0, RouterMetrics())
        wanted = Wanted("bytes", "r1", "r")
        [seat] = await dispatcher.admit(wanted, Share("t", cost=10), None)
        waiting = asyncio.create_task(dispatcher.admit(wanted, Share("t", cost=100), None))
        await asyncio.sleep(0)
        seat.leave()
        await asyncio.sleep(0)  # seated, and not told yet
        assert dispatcher._queue._levels[0].served["t"] == 110
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert dispatcher._queue._levels[0].served["t"] == 10


async def test_request_is_refused_when_the_queue_is_full(start: Callable[..., Any]) -> None:
    verifier = await start(capacity=1, budget=1)
    async with routing([verifier], queue_limit=2) as client:
        replies = [await client.generate().read_tokens(1), client.generate(), client.generate()]
        await client.queued(2)
        with pytest.raises(Overloaded, match=FULL) as refusal:
            await client.generate().read_all()
        assert refusal.value.retry_after_s == 1.0
        verifier.allow(100)
        for reply in replies:
            await reply.read_all()
