"""Who of the waiting, running and paused requests runs in the next step: pure functions.

A policy ranks them (`fcfs`, `by_length`); `choose` grants slots and KV pages in that order. Both
are asked at every step boundary, so a request runs on only while it is chosen again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum

MIN_RUN_STEPS = 16
"""Steps that a request may run before one that is only shorter takes its slot."""
CLEARLY_SHORTER = 2.0
"""How many times less time a request must need than the running one that it takes the slot of."""
FIRST_GUESS_TOKENS = 64
"""Of an output that nobody has foretold; doubled whenever it turns out to be longer."""


class State(IntEnum):
    """Where a request stands. A paused one has run, and has a right to run on."""

    RUNNING = 0
    PAUSED = 1
    WAITING = 2


@dataclass(frozen=True, slots=True)
class Claim:
    """A request, as far as it matters for whose turn it is.

    Attributes:
        handle: ascends in the order of arrival.
        priority: higher goes first.
        remaining_s: expected time to its end, once it runs.
        idle_s: time since its arrival in which it did not run.
        ran_steps: steps since it began, or went on.
    """

    handle: int
    state: State
    priority: int = 0
    remaining_s: float = 0.0
    idle_s: float = 0.0
    ran_steps: int = 0

    @property
    def is_running(self) -> bool:
        return self.state is State.RUNNING


Rank = tuple[float, ...]
Policy = Callable[[Claim], Rank]


def fcfs(claim: Claim) -> Rank:
    """Whoever runs runs on; then by arrival. Only a lack of pages ends a turn."""
    return (not claim.is_running, claim.handle)


def by_length(aging_s: float) -> Policy:
    """Preemptive: by priority, then shortest remaining time first.

    Whoever has not run for `aging_s` in all goes before everybody who has, until its end and in
    the order of arrival. So a request runs at the latest `aging_s` after its arrival, plus the time
    that those which arrived before it and have waited as long need to end.

    A running request counts as `CLEARLY_SHORTER` than it is, and nobody but an aged one takes its
    slot within its first `MIN_RUN_STEPS` steps: what is nearly as long is not worth a change.

    Source: the speculative scheduling of ALISE (Zhao et al. 2024, arXiv 2410.23537), section 4;
    aging as in FastServe (arXiv 2305.05920); limited preemption as in TRAIL (arXiv 2410.01035).
    """

    def rank(claim: Claim) -> Rank:
        if claim.idle_s >= aging_s:
            return (0, claim.handle)
        if claim.is_running and claim.ran_steps < MIN_RUN_STEPS:
            return (1, claim.handle)
        remaining_s = claim.remaining_s / (CLEARLY_SHORTER if claim.is_running else 1)
        return (2, -claim.priority, remaining_s, claim.state, claim.handle)

    return rank


@dataclass(frozen=True, slots=True)
class Choice:
    """Who runs, best rank first, and who runs now but not in the next step.

    Attributes:
        short_of_pages: handles of those preempted although nobody took their place: what runs has
            grown, and the pool is too small for all.
    """

    run: tuple[Claim, ...]
    preempted: tuple[Claim, ...]
    short_of_pages: frozenset[int]


def choose(
    claims: Iterable[Claim],
    policy: Policy,
    slots: int,
    pages: int,
    cost: Callable[[Claim], int | None],
) -> Choice:
    """Grant slots and pages by rank.

    A running request needs room for its next token. Who would begin or go on needs some more, and
    must leave each of those before it a page to grow by, or its turn would be short; nobody behind
    it begins instead, so that large requests are not passed over for ever.

    Args:
        claims: in any order.
        slots: requests that may run.
        pages: those of the pool that are free, or would be if none of the claims ran.
        cost: pages that a claim takes of them; None: it waits for something else, and holds
            nobody up. Asked only where a slot is left.
    """
    run: list[Claim] = []
    preempted: list[Claim] = []
    short_of_pages: set[int] = set()
    began = closed = False
    for claim in sorted(claims, key=policy):
        needed = cost(claim) if len(run) < slots and not (closed and not claim.is_running) else None
        spare = 0 if claim.is_running else len(run)
        if needed is not None and needed + spare <= pages:
            run.append(claim)
            pages -= needed
            began |= not claim.is_running
        elif claim.is_running:
            preempted.append(claim)
            if needed is not None and not began:
                short_of_pages.add(claim.handle)
        elif needed is not None:
            closed = True
    return Choice(tuple(run), tuple(preempted), frozenset(short_of_pages))


def expected_output(foretold: int | None, num_output: int, max_tokens: int) -> int:
    """Tokens that an output is expected to have, more than it has.

    What was foretold, or `FIRST_GUESS_TOKENS`, doubled until it is more than there are.
    """
    expected = FIRST_GUESS_TOKENS if foretold is None else max(1, foretold)
    while expected <= num_output:
        expected *= 2
    return min(expected, max_tokens)
