"""Whose turn it is: by hand, and over every history that can be thought of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treecast.services.verifier.schedule import (
    CLEARLY_SHORTER,
    MIN_RUN_STEPS,
    Choice,
    Claim,
    Policy,
    State,
    by_length,
    choose,
    expected_output,
    fcfs,
)

AGING_S = 30.0
LENGTH = by_length(AGING_S)
R, P, W = State.RUNNING, State.PAUSED, State.WAITING


def free(claim: Claim) -> int:
    return 0


def run(claims: Sequence[Claim], policy: Policy, slots: int = 2, pages: int = 99) -> list[int]:
    return [claim.handle for claim in choose(claims, policy, slots, pages, free).run]


# --- by hand ----------------------------------------------------------------------------------


def test_who_runs_runs_on_and_arrival_decides_the_rest_when_first_come_is_first_served() -> None:
    claims = [Claim(4, R, ran_steps=99), Claim(1, W), Claim(3, P), Claim(2, P)]
    assert run(claims, fcfs, slots=3) == [4, 1, 2]


def test_the_shortest_begin_when_nobody_runs() -> None:
    claims = [Claim(k, W, remaining_s=s) for k, s in enumerate([9.0, 1.0, 5.0, 3.0], 1)]
    assert run(claims, LENGTH) == [2, 4]


def test_priority_goes_before_length() -> None:
    claims = [Claim(1, W, 0, 1.0), Claim(2, W, 1, 50.0), Claim(3, W, -1, 0.5)]
    assert run(claims, LENGTH) == [2, 1]


@pytest.mark.parametrize(("newcomer_s", "takes"), [(4.9, True), (5.1, False)])
def test_a_slot_is_taken_only_by_one_that_is_clearly_shorter(
    newcomer_s: float, takes: bool
) -> None:
    assert CLEARLY_SHORTER == 2
    claims = [Claim(1, R, 0, 10.0, ran_steps=MIN_RUN_STEPS), Claim(2, W, 0, newcomer_s)]
    assert run(claims, LENGTH, slots=1) == [2 if takes else 1]


def test_a_request_keeps_its_slot_when_it_has_just_begun() -> None:
    claims = [Claim(1, R, 0, 99.0, ran_steps=MIN_RUN_STEPS - 1), Claim(2, W, 10, 0.1)]
    assert run(claims, LENGTH, slots=1) == [1]


def test_an_aged_request_goes_first_and_is_not_preempted() -> None:
    aged = Claim(1, P, -10, 999.0, idle_s=AGING_S)
    claims = [aged, Claim(2, R, 10, 0.1, ran_steps=1), Claim(3, W, 10, 0.1)]
    assert run(claims, LENGTH, slots=1) == [1]
    claims[0] = replace(aged, state=R, ran_steps=500)
    assert run(claims, LENGTH, slots=1) == [1]


def test_aged_requests_go_in_the_order_of_arrival() -> None:
    claims = [Claim(k, W, idle_s=AGING_S + k) for k in (3, 1, 2)]
    assert run(claims, LENGTH) == [1, 2]


def with_pages(
    claims: Sequence[Claim], costs: dict[int, int | None], pages: int, policy: Policy = fcfs
) -> Choice:
    return choose(claims, policy, 8, pages, lambda claim: costs[claim.handle])


def test_the_youngest_is_paused_for_memory_when_those_that_run_have_grown() -> None:
    choice = with_pages([Claim(1, R), Claim(2, R), Claim(3, R)], {1: 4, 2: 4, 3: 2}, 8)
    assert [claim.handle for claim in choice.run] == [1, 2]
    assert [claim.handle for claim in choice.preempted] == [3]
    assert choice.short_of_pages == {3}


def test_the_longest_is_paused_when_a_short_one_needs_its_pages() -> None:
    claims = [Claim(1, R, 0, 90.0, ran_steps=99), Claim(2, W, 0, 1.0)]
    choice = with_pages(claims, {1: 6, 2: 3}, 8, LENGTH)
    assert [claim.handle for claim in choice.run] == [2]
    assert [claim.handle for claim in choice.preempted] == [1]
    assert not choice.short_of_pages


def test_nobody_begins_before_a_large_request_that_does_not_fit() -> None:
    choice = with_pages([Claim(1, R), Claim(2, W), Claim(3, W)], {1: 4, 2: 9, 3: 1}, 10)
    assert [claim.handle for claim in choice.run] == [1]


def test_a_newcomer_leaves_a_page_to_each_that_runs() -> None:
    claims = [Claim(1, R), Claim(2, R), Claim(3, W)]
    assert len(with_pages(claims, {1: 1, 2: 1, 3: 2}, 5).run) == 2
    assert len(with_pages(claims, {1: 1, 2: 1, 3: 2}, 6).run) == 3


def test_one_that_waits_for_a_sibling_holds_nobody_up() -> None:
    choice = with_pages([Claim(1, W), Claim(2, W)], {1: None, 2: 1}, 1)
    assert [claim.handle for claim in choice.run] == [2]


@pytest.mark.parametrize(
    ("foretold", "num_output", "expected"),
    [
        (None, 0, 64), (None, 63, 64), (None, 64, 128), (None, 300, 512),
        (10, 9, 10), (10, 10, 20), (10, 45, 80), (0, 0, 1), (5000, 0, 1000), (None, 900, 1000),
    ],
)  # fmt: skip
def test_an_output_is_expected_to_double_when_it_is_longer_than_foretold(
    foretold: int | None, num_output: int, expected: int
) -> None:
    assert expected_output(foretold, num_output, 1000) == expected


# --- over all histories -----------------------------------------------------------------------

CLAIMS = st.lists(
    st.builds(
        Claim,
        st.integers(1, 10_000),
        st.sampled_from(State),
        st.integers(-10, 10),
        st.floats(0, 1000),
        st.sampled_from([0.0, 5.0, AGING_S, 3 * AGING_S]),
        st.integers(0, 3 * MIN_RUN_STEPS),
    ),
    max_size=12,
    unique_by=lambda claim: claim.handle,
)
POLICIES = st.sampled_from([fcfs, LENGTH])


def cost_of(claim: Claim) -> int | None:
    """Of some sizes, and now and then one that waits for a sibling."""
    kind = claim.handle % 7
    return None if kind == 6 and claim.state is W else 1 + kind


@settings(deadline=None)
@given(CLAIMS, POLICIES, st.integers(1, 6), st.integers(0, 40))
def test_slots_and_pages_are_never_exceeded(
    claims: list[Claim], policy: Policy, slots: int, pages: int
) -> None:
    choice = choose(claims, policy, slots, pages, cost_of)
    assert len(choice.run) <= slots
    assert sum(cost_of(claim) or 0 for claim in choice.run) <= pages
    running = {claim.handle for claim in claims if claim.is_running}
    stay = {claim.handle for claim in choice.run} & running
    assert {claim.handle for claim in choice.preempted} == running - stay


def begun(claim: Claim) -> Claim:
    return claim if claim.is_running else replace(claim, state=R, ran_steps=0)


@settings(deadline=None)
@given(CLAIMS, POLICIES, st.integers(1, 6), st.integers(0, 60))
def test_nothing_changes_when_nothing_has_changed(
    claims: list[Claim], policy: Policy, slots: int, pages: int
) -> None:
    """Who was chosen is chosen again; whoever is freed of room by that may join."""
    first = choose(claims, policy, slots, pages, cost_of)
    chosen = {claim.handle for claim in first.run}
    after = [
        begun(claim)
        if claim.handle in chosen
        else replace(claim, state=P if claim.is_running else claim.state)
        for claim in claims
    ]
    again = choose(after, policy, slots, pages, cost_of)
    assert chosen <= {claim.handle for claim in again.run}
    assert not again.preempted


@settings(deadline=None)
@given(CLAIMS, st.integers(1, 6))
def test_who_runs_is_no_longer_than_who_waits_when_nobody_has_aged_or_begun(
    claims: list[Claim], slots: int
) -> None:
    fresh = [replace(claim, state=W, idle_s=0.0) for claim in claims]
    chosen = set(choose(fresh, LENGTH, slots, 99, free).run)
    for one in chosen:
        for other in set(fresh) - chosen:
            assert (-one.priority, one.remaining_s) <= (-other.priority, other.remaining_s)


@dataclass
class Job:
    """A request of the simulation: steps are seconds."""

    handle: int
    arrival: int
    steps: int
    guess: float
    priority: int
    begun: int | None = None
    running_since: int | None = None
    ran: int = 0

    def claim(self, now: int) -> Claim:
        state = R if self.running_since is not None else (W if self.begun is None else P)
        since = 0 if self.running_since is None else now - self.running_since
        idle_s = float(now - self.arrival - self.ran)
        return Claim(self.handle, state, self.priority, self.guess, idle_s, since)


JOBS = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 40), st.floats(0.1, 100), st.integers(-10, 10)),
    min_size=1,
    max_size=25,
)


def simulate(jobs: list[Job], slots: int, policy: Policy, aging_s: float) -> None:
    """Run all jobs to their ends, holding every step against the bound."""
    left, now = list(jobs), 0
    while left:
        there = [job for job in left if job.arrival <= now]
        choice = choose([job.claim(now) for job in there], policy, slots, 99, free)
        chosen = {claim.handle for claim in choice.run}
        assert len(chosen) == min(slots, len(there))
        for job in there:
            aged = job.claim(now).idle_s >= aging_s
            if aged and job.handle not in chosen:
                assert all(handle < job.handle for handle in chosen)
            job.running_since = (
                None
                if job.handle not in chosen
                else (now if job.running_since is None else job.running_since)
            )
            job.begun = job.begun if job.begun is not None or job.handle not in chosen else now
            job.ran += job.handle in chosen
        left = [job for job in left if job.ran < job.steps]
        now += 1


def jobs_of(given: list[tuple[int, int, float, int]]) -> list[Job]:
    ordered = sorted(given, key=lambda job: job[0])
    return [Job(handle, *job) for handle, job in enumerate(ordered, 1)]


@settings(deadline=None)
@given(JOBS, st.integers(1, 4))
def test_nobody_starves_beyond_the_bound_whatever_arrives(
    given_jobs: list[tuple[int, int, float, int]], slots: int
) -> None:
    jobs = jobs_of(given_jobs)
    simulate(jobs, slots, LENGTH, AGING_S)
    for job in jobs:
        assert job.begun is not None
        before = sum(other.steps for other in jobs if other.handle < job.handle)
        assert job.begun - job.arrival <= AGING_S + before


def test_a_long_request_starves_when_nothing_ages() -> None:
    """The negative control: short ones without end, and no aging."""
    flood = [(at, 2, 1.0, 0) for at in range(100)]
    jobs = jobs_of([(0, 5, 100.0, 0), *flood])
    simulate(jobs, 1, by_length(1e9), 1e9)
    long = next(job for job in jobs if job.guess == 100.0)
    assert long.begun is not None
    assert long.begun > 150
    again = jobs_of([(0, 5, 100.0, 0), *flood])
    simulate(again, 1, LENGTH, AGING_S)
    long = next(job for job in again if job.guess == 100.0)
    assert long.begun is not None
    assert long.begun <= AGING_S + 2
