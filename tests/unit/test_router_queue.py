"""The router's bounded queue."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from treecast.errors import Overloaded
from treecast.services.router.queue import Share, WaitingQueue

FULL = r"^queue has 2 requests, 2 of them of tenant 't'; the limit is 2$"


def test_items_come_in_order_of_arrival_when_priorities_are_equal() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=3)
    for name in ("a", "b", "c"):
        queue.join(name, Share("t", 0))
    assert list(queue) == ["a", "b", "c"]


def test_higher_priority_goes_first_when_it_arrives_later() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=4)
    queue.join("low", Share("t", -1))
    queue.join("first", Share("t", 5))
    queue.join("plain", Share("t", 0))
    queue.join("second", Share("t", 5))
    assert list(queue) == ["first", "second", "plain", "low"]


def test_join_is_refused_by_size_and_limit_when_full() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=2)
    queue.join("a", Share("t", 0))
    queue.join("b", Share("t", 0))
    with pytest.raises(Overloaded, match=FULL) as refusal:
        queue.join("c", Share("t", 10))
    assert refusal.value.retry_after_s == 1.0
    assert list(queue) == ["a", "b"]


def test_place_is_free_again_when_an_item_leaves() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=2)
    queue.join("a", Share("t", 0))
    queue.join("b", Share("t", 0))
    queue.leave("a")
    queue.leave("a")
    queue.join("c", Share("t", 0))
    assert list(queue) == ["b", "c"]
    assert len(queue) == 2


def test_returning_items_go_ahead_in_their_order_when_the_queue_is_full() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=1)
    queue.join("new", Share("t", 10))
    queue.rejoin("back")
    queue.rejoin("back too")
    assert list(queue) == ["back", "back too", "new"]


def test_iteration_goes_on_when_items_leave_meanwhile() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=3)
    for name in ("a", "b", "c"):
        queue.join(name, Share("t", 0))
    seen = []
    for name in queue:
        seen.append(name)
        queue.leave(name)
    assert seen == ["a", "b", "c"]
    assert len(queue) == 0


# --- between tenants ----------------------------------------------------------------------------


def order(queue: WaitingQueue[str]) -> str:
    """Serve all, charging each its cost, as the dispatcher does."""
    served = ""
    while len(queue):
        first = next(iter(queue))
        queue.leave(first)
        queue.charge(shares[first], shares[first].cost)
        served += first[0]
    return served


shares: dict[str, Share] = {}


def join(queue: WaitingQueue[str], name: str, cost: int = 1, priority: int = 0) -> str | None:
    shares[name] = Share(name[0], priority, cost)
    return queue.join(name, shares[name])


def test_light_tenant_takes_every_other_turn_when_a_neighbour_fills_the_queue() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=100)
    for number in range(8):
        join(queue, f"heavy{number}")
    for number in range(3):
        join(queue, f"light{number}")
    assert "".join(name[0] for name in queue) == order(queue) == "lhlhlhhhhhh"


def test_light_tenant_waits_behind_its_neighbour_in_a_plain_queue() -> None:
    """The negative control: one tenant's requests are first come first served."""
    queue: WaitingQueue[str] = WaitingQueue(limit=100)
    names = [*(f"heavy{n}" for n in range(8)), *(f"light{n}" for n in range(3))]
    for name in names:
        queue.join(name, Share("all"))
    assert list(queue) == names


def test_turns_are_fair_by_tokens_when_requests_differ_in_size() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=100)
    for number in range(3):
        join(queue, f"big{number}", cost=4)
    for number in range(9):
        join(queue, f"small{number}", cost=1)
    assert order(queue) == "bssssbssssbs"


def test_tenants_are_never_further_apart_than_one_request() -> None:
    """Of tenants that wait all the time, by what they were served so far."""
    queue: WaitingQueue[str] = WaitingQueue(limit=1000)
    rng = random.Random(1)
    for number in range(600):
        join(queue, f"{rng.choice('aab')}{number}", cost=rng.randint(1, 50))
    served = {"a": 0, "b": 0}
    waiting = Counter(name[0] for name in queue)
    while min(waiting.values()):
        first = next(iter(queue))
        queue.leave(first)
        queue.charge(shares[first], shares[first].cost)
        served[first[0]] += shares[first].cost
        waiting[first[0]] -= 1
        assert abs(served["a"] - served["b"]) <= 50


def test_nobody_saves_up_turns_by_not_asking() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=100)
    join(queue, "old0", cost=1000)
    order(queue)
    for number in range(4):
        join(queue, f"new{number}", cost=10)
    for number in range(4):
        join(queue, f"old{number}", cost=10)
    assert order(queue) == "nonononon"[:8]


def test_unspent_tokens_bring_a_tenant_forward() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=100)
    join(queue, "a0", cost=100)
    join(queue, "b0", cost=100)
    join(queue, "a1", cost=100)
    join(queue, "b1", cost=100)
    for name in ("a0", "b0"):
        queue.leave(name)
        queue.charge(shares[name], 100)
    queue.charge(shares["b0"], -90)
    assert list(queue) == ["b1", "a1"]


def test_priority_comes_before_fairness() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=100)
    join(queue, "light", priority=0)
    for number in range(3):
        join(queue, f"heavy{number}", priority=1)
    assert order(queue) == "hhhl"


def test_longest_line_gives_way_when_the_queue_is_full() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=4)
    for number in range(4):
        join(queue, f"heavy{number}", priority=-number)
    assert join(queue, "light0") == "heavy3"  # the newest, of the lowest priority
    assert join(queue, "light1") == "heavy2"
    with pytest.raises(Overloaded, match=r"^queue has 4 requests, 2 of them of tenant 'l'"):
        join(queue, "light2")
    with pytest.raises(Overloaded, match=r"^queue has 4 requests, 2 of them of tenant 'h'"):
        join(queue, "heavy4")
