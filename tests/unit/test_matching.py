"""Requests to speculators: against brute force, and never over a capacity."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treecast.services.verifier.choice.matching import match

Instance = tuple[list[list[float]], list[int]]
Assigned = list[int | None]


@st.composite
def instances(draw: st.DrawFn, most_requests: int, most_speculators: int) -> Instance:
    """Values, many of them equal or zero, and capacities of which some are negative."""
    requests = draw(st.integers(0, most_requests))
    speculators = draw(st.integers(0, most_speculators))
    value = st.integers(-1, 6).map(float)
    row = st.lists(value, min_size=speculators, max_size=speculators)
    values = draw(st.lists(row, min_size=requests, max_size=requests))
    capacity = st.integers(-1, 4)
    return values, draw(st.lists(capacity, min_size=speculators, max_size=speculators))


def worth(values: Sequence[Sequence[float]], assigned: Assigned) -> float:
    return sum(values[i][j] for i, j in enumerate(assigned) if j is not None)


def overfull(assigned: Assigned, capacities: Sequence[int]) -> list[int]:
    used = Counter(j for j in assigned if j is not None)
    return [j for j, count in used.items() if count > max(0, capacities[j])]


def brute_force(values: Sequence[Sequence[float]], capacities: Sequence[int]) -> float:
    places: list[int | None] = [None, *range(len(capacities))]
    every = (list(choice) for choice in itertools.product(places, repeat=len(values)))
    return max(worth(values, each) for each in every if not overfull(each, capacities))


def greedy(values: Sequence[Sequence[float]], capacities: Sequence[int]) -> Assigned:
    """Everybody to its best, whoever else goes there."""
    return [max(range(len(row)), key=row.__getitem__, default=None) for row in values]


def check_capacity(assign: Callable[[list[list[float]], list[int]], Assigned]) -> None:
    @settings(max_examples=300, deadline=None, database=None)
    @given(instances(most_requests=24, most_speculators=6))
    def holds(instance: Instance) -> None:
        values, capacities = instance
        assert not overfull(assign(values, capacities), capacities)

    holds()


def test_matching_never_exceeds_a_capacity() -> None:
    check_capacity(match)


def test_capacity_check_catches_an_assignment_that_ignores_it() -> None:
    with pytest.raises(AssertionError):
        check_capacity(greedy)


@settings(max_examples=200, deadline=None, database=None)
@given(instances(most_requests=4, most_speculators=3))
def test_matching_is_worth_as_much_as_the_best_of_all(instance: Instance) -> None:
    values, capacities = instance
    assigned = match(values, capacities)
    assert worth(values, assigned) == brute_force(values, capacities)
    assert all(values[i][j] > 0 for i, j in enumerate(assigned) if j is not None)


def test_the_one_that_loses_least_goes_elsewhere_when_the_best_is_full() -> None:
    # One slot at 0: 9 + 4 beats 10 + 1.
    assert match([[10, 4], [9, 1]], [1, 5]) == [1, 0]


def test_matching_is_quick_when_a_capacity_is_absurd() -> None:
    assert match([[1.0, 2.0]] * 32, [10**12, 1]).count(1) == 1
