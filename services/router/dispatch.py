"""Dispatch: a request waits in the queue until a verifier has room, or its time is up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from treecast.errors import DeadlineExceeded, Overloaded, TreecastError, Unavailable

from .fleet import Fleet
from .metrics import RouterMetrics
from .placement import Candidate, Placement, Wanted, serves
from .queue import Share, WaitingQueue
from .seat import Seat
from .turns import turns

SEATS_PER_TURN = 8
"""Requests that are seated at one turn of the event loop; each then has something to do."""

CHARGED = Share("")
"""Of a request that is placed anew: it was charged when it was placed first."""


@dataclass(eq=False, slots=True)
class Ticket:
    """A request that waits: its turn comes as seats, or as an error."""

    wanted: Wanted
    share: Share
    turn: asyncio.Future[list[Seat]]
    timers: list[asyncio.TimerHandle] = field(default_factory=list)
    grace: asyncio.TimerHandle | None = None

    def fail(self, error: TreecastError) -> None:
        if not self.turn.done():
            self.turn.set_exception(error)

    def stop_timers(self) -> None:
        for timer in self.timers:
            timer.cancel()
        self.end_grace()

    def end_grace(self) -> None:
        if self.grace is not None:
            self.grace.cancel()
            self.grace = None


class Dispatcher:
    """Hands out the fleet's seats in the queue's order. Event loop only."""

    def __init__(
        self, fleet: Fleet, queue_limit: int, grace_s: float, metrics: RouterMetrics
    ) -> None:
        self._fleet = fleet
        self._queue: WaitingQueue[Ticket] = WaitingQueue(queue_limit)
        self._grace_s = grace_s
        self._metrics = metrics
        self._pumping = False
        fleet.watch(self._pump_soon)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    async def admit(self, wanted: Wanted, share: Share, deadline_s: float | None) -> list[Seat]:
        """Wait for seats for a new request, one per sample; the caller leaves each.

        Args:
            share: what its tenant is charged once it is seated; see `settle`.
            deadline_s: time of the event loop; None for no limit.
        Raises:
            Overloaded: the queue is full, or had to make room for other tenants' requests.
            DeadlineExceeded: the deadline passed in the queue.
            Unavailable: no verifier of the model was there for the grace period.
        """
        ticket = self._ticket(wanted, share)
        pushed_out = self._queue.join(ticket, share)
        if pushed_out is not None:
            pushed_out.fail(
                Overloaded(
                    f"queue is full; tenant {pushed_out.share.tenant!r} had most of the requests "
                    "in it, and this one gave way to another tenant's"
                )
            )
        return await self._wait(ticket, deadline_s)

    async def readmit(self, wanted: Wanted, deadline_s: float | None) -> list[Seat]:
        """The same for samples that had seats: ahead of all new ones, and never Overloaded."""
        ticket = self._ticket(wanted, CHARGED)
        self._queue.rejoin(ticket)
        return await self._wait(ticket, deadline_s)

    def settle(self, share: Share, spent: int) -> None:
        """A request that was seated has ended: its tenant pays the tokens that were spent."""
        self._queue.charge(share, spent - share.cost)

    def _ticket(self, wanted: Wanted, share: Share) -> Ticket:
        return Ticket(wanted, share, asyncio.get_running_loop().create_future())

    async def _wait(self, ticket: Ticket, deadline_s: float | None) -> list[Seat]:
        if deadline_s is not None:
            late = DeadlineExceeded("deadline passed while the request waited for a verifier")
            loop = asyncio.get_running_loop()
            ticket.timers.append(loop.call_at(deadline_s, ticket.fail, late))
        self._pump_soon()
        try:
            return await ticket.turn
        except asyncio.CancelledError:
            self._give_back(ticket)
            raise
        finally:
            ticket.stop_timers()
            self._queue.leave(ticket)
            self._metrics.queued.set(len(self._queue))

    def _give_back(self, ticket: Ticket) -> None:
        """Seats that came in the very moment in which their request was cancelled."""
        if ticket.turn.cancelled() or ticket.turn.exception() is not None:
            return
        for seat in ticket.turn.result():
            seat.leave()
        if ticket.share is not CHARGED:
            self.settle(ticket.share, 0)

    def _pump_soon(self) -> None:
        """Have the queue looked through, once however much has changed. Called whenever somebody
        may have got a turn.
        """
        if self._queue and not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Seat whoever can be seated, in order. Whose turn it is where, `turns` says."""
        self._pumping = False
        there = self._fleet.candidates()
        seated = 0
        for ticket, placement in turns(self._waiting(), self._fleet.candidates):
            if placement is not None:
                self._seat(ticket, placement)
                seated += 1
            self._watch_grace(ticket, there)
            if seated == SEATS_PER_TURN:
                self._pump_soon()
                break
        self._metrics.queued.set(len(self._queue))

    def _waiting(self) -> Iterator[Ticket]:
        return (ticket for ticket in self._queue if not ticket.turn.done())

    def _seat(self, ticket: Ticket, placement: Placement) -> None:
        slots = range(ticket.wanted.slots)
        ticket.turn.set_result([self._fleet.seat(placement) for _ in slots])
        self._queue.leave(ticket)
        if ticket.share is not CHARGED:
            self._queue.charge(ticket.share, ticket.share.cost)
        self._metrics.placements.labels(placement.by.value).inc()

    def _watch_grace(self, ticket: Ticket, candidates: Iterable[Candidate]) -> None:
        if ticket.turn.done() or any(serves(one, ticket.wanted) for one in candidates):
            ticket.end_grace()
        elif ticket.grace is None:
            gone = Unavailable(
                f"no verifier of model {ticket.wanted.model!r} is available; "
                f"waited {self._grace_s:g} s"
            )
            loop = asyncio.get_running_loop()
            ticket.grace = loop.call_later(self._grace_s, ticket.fail, gone)
