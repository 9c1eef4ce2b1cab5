"""So many at each turn of the event loop."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, cast

import pytest

from treecast.services.router.dispatch import SEATS_PER_TURN, Dispatcher
from treecast.services.router.metrics import RouterMetrics
from treecast.services.router.placement import Candidate, Wanted
from treecast.services.router.queue import Share
from treecast.services.router.turnstile import Turnstile
from treecast.wire.frames import Hello, Role


class Turns:
    """Counts the event loop's turns while it is entered."""

    def __init__(self) -> None:
        self.count = 0
        self._over = False

    def __enter__(self) -> Turns:
        self._next()
        return self

    def __exit__(self, *error: object) -> None:
        self._over = True

    def _next(self) -> None:
        if not self._over:
            self.count += 1
            asyncio.get_running_loop().call_soon(self._next)


async def test_no_more_go_through_in_one_turn_than_told_and_in_the_order_they_came() -> None:
    turnstile, through = Turnstile(per_turn=3), list[tuple[int, int]]()
    with Turns() as turns:

        async def go(number: int) -> None:
            await turnstile.enter()
            through.append((number, turns.count))

        await asyncio.gather(*map(go, range(20)))
    assert [number for number, _ in through] == list(range(20))
    sizes = [len(list(group)) for _, group in itertools.groupby(turn for _, turn in through)]
    assert max(sizes) == 3
    assert len(sizes) == 7


async def test_one_that_comes_alone_does_not_wait_for_a_turn() -> None:
    turnstile = Turnstile(per_turn=1)
    with Turns() as turns:
        await turnstile.enter()
        assert turns.count == 1
        await turnstile.enter()
        assert turns.count > 1


async def test_who_is_cancelled_in_the_line_takes_no_turn() -> None:
    turnstile = Turnstile(per_turn=1)
    tasks = [asyncio.create_task(turnstile.enter()) for _ in range(5)]
    await asyncio.sleep(0)
    for task in tasks[1:4]:
        task.cancel()
    async with asyncio.timeout(10):
        await tasks[4]
        await turnstile.enter()
    assert [task.cancelled() for task in tasks] == [False, True, True, True, False]


class OneVerifier:
    """As a fleet: a verifier with room for so many; counts how often it is looked at."""

    def __init__(self, room: int) -> None:
        self.room, self.looked, self.seated = room, 0, list[object]()

    def watch(self, watcher: Any) -> None:
        self.changed = watcher

    def candidates(self) -> list[Candidate]:
        self.looked += 1
        hello = Hello("v", Role.VERIFIER, model="m", model_revision="r", capacity=self.room)
        return [Candidate(hello, seated=len(self.seated))]

    def seat(self, placement: object) -> object:
        self.seated.append(placement)
        return placement


@pytest.mark.parametrize("room", [0, 1000])
async def test_queue_is_looked_through_once_for_all_who_join_it_in_one_turn(room: int) -> None:
    fleet = OneVerifier(room)
    dispatcher = Dispatcher(cast(Any, fleet), 1000, 10.0, RouterMetrics())
    wanted = Wanted("m", "r", "")
    with Turns() as turns:
        waiting = [
            asyncio.create_task(dispatcher.admit(wanted, Share("t"), None)) for _ in range(100)
        ]
        await asyncio.sleep(0)
        assert fleet.looked == 0
        while len(fleet.seated) < min(room, 100):
            before = len(fleet.seated)
            await asyncio.sleep(0)
            assert len(fleet.seated) - before <= SEATS_PER_TURN
        await asyncio.sleep(0)
    assert fleet.looked <= 3 * turns.count + len(fleet.seated)
    if not room:
        assert fleet.looked == 2  # once for its verifiers, once for whose turn it is
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert dispatcher.num_waiting == 0
