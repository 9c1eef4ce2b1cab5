"""Whose turn it is, held against the same decision made the slow way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from treecast.services.router.placement import Candidate, Placement, Wanted, keep_free, place
from treecast.services.router.turns import turns
from treecast.wire.frames import Heartbeat, Hello, Role


@dataclass(frozen=True)
class Ticket:
    wanted: Wanted


class Room:
    """Verifiers whose places are taken as they are handed out."""

    def __init__(self, candidates: list[Candidate]) -> None:
        self.now = {one.instance_id: one for one in candidates}

    def candidates(self) -> list[Candidate]:
        return list(self.now.values())

    def seat(self, ticket: Ticket, placement: Placement) -> None:
        one = self.now[placement.instance_id]
        self.now[placement.instance_id] = replace(one, seated=one.seated + ticket.wanted.slots)


def slowly(waiting: list[Ticket], room: Room) -> list[Placement | None]:
    """Every one against every verifier, full or not."""
    found, kept = [], set()
    for ticket in waiting:
        left = [one for one in room.candidates() if one.instance_id not in kept]
        placement = place(left, ticket.wanted)
        found.append(placement)
        if placement is None:
            kept.add(keep_free(left, ticket.wanted))
        else:
            room.seat(ticket, placement)
    return found


def quickly(
    waiting: list[Ticket], room: Room, looks: Callable[[], None] = lambda: None
) -> list[Placement | None]:
    def candidates() -> list[Candidate]:
        looks()
        return room.candidates()

    found = []
    for ticket, placement in turns(waiting, candidates):
        found.append(placement)
        if placement is not None:
            room.seat(ticket, placement)
    return found


def candidate(name: str, capacity: int, seated: int, load: int, trusted: bool) -> Candidate:
    hello = Hello(name, Role.VERIFIER, capacity=capacity, model="m", model_revision=name[-1:])
    return Candidate(hello, Heartbeat(running=load), seated=min(seated, capacity), trusted=trusted)


@st.composite
def fleets(draw: st.DrawFn) -> list[Candidate]:
    return [
        candidate(
            f"v{number}{draw(st.sampled_from('xy'))}",
            draw(st.integers(0, 4)),
            draw(st.integers(0, 4)),
            draw(st.integers(0, 6)),
            draw(st.booleans()),
        )
        for number in range(draw(st.integers(0, 5)))
    ]


TICKETS = st.builds(
    lambda number, revision, slots, holder: Ticket(
        Wanted("m", revision, f"r{number}", slots=slots, holder=holder)
    ),
    st.integers(0, 99),
    st.sampled_from("xy"),
    st.integers(1, 5),
    st.sampled_from(["", "v0x", "v1y"]),
)


@given(fleets(), st.lists(TICKETS, max_size=12))
def test_turns_are_those_of_the_slow_way(fleet: list[Candidate], waiting: list[Ticket]) -> None:
    assert quickly(waiting, Room(fleet)) == slowly(waiting, Room(fleet))


def test_rest_of_the_queue_costs_nothing_when_every_place_is_taken() -> None:
    room = Room([candidate("vx", 2, 0, 0, True)])
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1

    waiting = [Ticket(Wanted("m", "x", f"r{number}")) for number in range(50)]
    found = quickly(waiting, room, look)
    assert [placement is not None for placement in found] == [True, True] + [False] * 48
    assert looks == 3  # once, and once after each that was seated
