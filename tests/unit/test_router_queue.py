"""The router's bounded queue."""

from __future__ import annotations

import pytest

from treecast.errors import Overloaded
from treecast.services.router.queue import WaitingQueue


def test_items_come_in_order_of_arrival_when_priorities_are_equal() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=3)
    for name in ("a", "b", "c"):
        queue.join(name, priority=0)
    assert list(queue) == ["a", "b", "c"]


def test_higher_priority_goes_first_when_it_arrives_later() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=4)
    queue.join("low", priority=-1)
    queue.join("first", priority=5)
    queue.join("plain", priority=0)
    queue.join("second", priority=5)
    assert list(queue) == ["first", "second", "plain", "low"]


def test_join_is_refused_by_size_and_limit_when_full() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=2)
    queue.join("a", priority=0)
    queue.join("b", priority=0)
    with pytest.raises(Overloaded, match=r"^queue has 2 requests; the limit is 2$") as refusal:
        queue.join("c", priority=10)
    assert refusal.value.retry_after_s == 1.0
    assert list(queue) == ["a", "b"]


def test_place_is_free_again_when_an_item_leaves() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=2)
    queue.join("a", priority=0)
    queue.join("b", priority=0)
    queue.leave("a")
    queue.leave("a")
    queue.join("c", priority=0)
    assert list(queue) == ["b", "c"]
    assert len(queue) == 2


def test_returning_items_go_ahead_in_their_order_when_the_queue_is_full() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=1)
    queue.join("new", priority=10)
    queue.rejoin("back")
    queue.rejoin("back too")
    assert list(queue) == ["back", "back too", "new"]


def test_iteration_goes_on_when_items_leave_meanwhile() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=3)
    for name in ("a", "b", "c"):
        queue.join(name, priority=0)
    seen = []
    for name in queue:
        seen.append(name)
        queue.leave(name)
    assert seen == ["a", "b", "c"]
    assert len(queue) == 0
