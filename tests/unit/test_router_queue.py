"""The router's bounded queue."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treecast.errors import Overloaded
from treecast.services.router.queue import Share, WaitingQueue, rank_of

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


# --- within a tenant's line ---------------------------------------------------------------------

Arrival = tuple[float, int]
"""Seconds after the one before, and tokens expected."""

ARRIVALS = st.lists(
    st.tuples(st.floats(0, 20), st.integers(0, 300)), min_size=1, max_size=40
)  # fmt: skip
GIVE_WAY_S = 0.1


def line_of(arrivals: list[Arrival], order: str = "shortest") -> tuple[list[int], list[float]]:
    """The numbers of the arrivals as they would be served, and when each came."""
    queue: WaitingQueue[int] = WaitingQueue(limit=1000)
    now_s, times = 0.0, []
    for number, (gap_s, tokens) in enumerate(arrivals):
        now_s += gap_s
        times.append(now_s)
        rank = rank_of(order, now_s, tokens, GIVE_WAY_S)  # type: ignore[arg-type]
        queue.join(number, Share("t", rank=rank))
    return list(queue), times


@given(ARRIVALS)
def test_nobody_is_passed_by_one_that_came_later_than_its_tokens_allow(
    arrivals: list[Arrival],
) -> None:
    """No request starves: those that may go ahead of it have all come by a time that is fixed."""
    line, times = line_of(arrivals)
    place = {number: at for at, number in enumerate(line)}
    for number, (_, tokens) in enumerate(arrivals):
        passed_by = [one for one in line[: place[number]] if one > number]
        for one in passed_by:
            assert arrivals[one][1] < tokens
            assert times[one] - times[number] <= GIVE_WAY_S * (tokens - arrivals[one][1]) + 1e-9


@given(ARRIVALS)
def test_line_is_first_come_first_served_when_the_order_says_so(arrivals: list[Arrival]) -> None:
    assert line_of(arrivals, "fcfs")[0] == list(range(len(arrivals)))


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40))
def test_shortest_goes_first_when_all_come_at_once(tokens: list[int]) -> None:
    line, _ = line_of([(0.0, count) for count in tokens])
    assert line == sorted(range(len(tokens)), key=lambda number: (tokens[number], number))


def test_long_request_starves_when_it_does_not_age() -> None:
    """The negative control: by length alone, it is passed for as long as shorter ones come."""
    arrivals = [(0.0, 300), *((20.0, 10) for _ in range(30))]
    assert line_of(arrivals)[0].index(0) == 1  # by those that came within 29 s
    queue: WaitingQueue[int] = WaitingQueue(limit=1000)
    for number, (_, count) in enumerate(arrivals):
        queue.join(number, Share("t", rank=count))
    assert list(queue)[-1] == 0


def test_turns_between_tenants_stay_fair_when_lines_are_ordered_by_length() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=100)
    for number, rank in enumerate((3.0, 1.0, 2.0)):
        queue.join(f"a{number}", Share("a", rank=rank))
        queue.join(f"b{number}", Share("b", rank=-rank))
    assert list(queue) == ["a1", "b0", "a2", "b2", "a0", "b1"]


def test_the_last_in_line_gives_way_when_the_queue_is_full() -> None:
    queue: WaitingQueue[str] = WaitingQueue(limit=3)
    for name, rank in (("h0", 9.0), ("h1", 1.0), ("h2", 2.0)):
        queue.join(name, Share("h", rank=rank))
    assert queue.join("l0", Share("l")) == "h0"
