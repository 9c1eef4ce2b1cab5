"""A router in simulated time: its real queue, turns, placement, sessions and guesses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import simpy

from treecast.errors import Overloaded
from treecast.sampling.params import Law, SamplingParams
from treecast.sampling.stops import FinishReason
from treecast.services.router.lengths import (
    Expected,
    HistoryPredictor,
    LengthPredictor,
    predictor_of,
)
from treecast.services.router.placement import Candidate, PlacedBy, Placement, Wanted
from treecast.services.router.queue import Share, WaitingQueue, rank_of
from treecast.services.router.sessions import (
    LeasedSession,
    NoSession,
    Session,
    Whereabouts,
)
from treecast.services.router.turns import turns
from treecast.wire.frames import Heartbeat, Hello, Role

from .scenario import Scenario
from .state import MemoryLeases, MemoryPrefixes, at_once
from .verifier import Serving, SimVerifier
from .workload import MAX_TOKENS, Turn

MODEL = "simulated"


def hello_of(instance_id: str, scenario: Scenario) -> Hello:
    laws = (Law.REPLAY,)
    return Hello(
        instance_id, Role.VERIFIER, laws=laws, capacity=scenario.slots, model=MODEL,
        model_revision="r",
    )  # fmt: skip


@dataclass(slots=True, eq=False)
class Request:
    """A turn on its way through a router; what it needs of `turns` is `wanted`.

    Attributes:
        done: triggered when its last token has come, or it was refused.
        committed: output tokens that have come, over all placements.
    """

    turn: Turn
    arrived_s: float
    done: simpy.Event
    session: Session
    expected: Expected | None
    share: Share
    wanted: Wanted
    where: Whereabouts
    committed: int = 0
    placements: int = 0
    by: PlacedBy | None = None
    serving: Serving | None = None
    first_s: float | None = None
    ended_s: float | None = None


@dataclass(slots=True)
class Stream:
    """A router's view of one verifier: its last heartbeat, and who sits there."""

    verifier: SimVerifier
    candidate: Candidate
    seats: dict[int, Request] = field(default_factory=dict)


class SimRouter:
    """One router. Others' placements it learns of by heartbeats and by the shared leases alone."""

    def __init__(
        self,
        env: simpy.Environment,
        scenario: Scenario,
        leases: MemoryLeases,
        prefixes: MemoryPrefixes,
    ) -> None:
        self._env = env
        self._scenario = scenario
        self._leases = leases
        self._prefixes = prefixes
        self._lengths = _predictor(scenario)
        self._queue: WaitingQueue[Request] = WaitingQueue(scenario.queue_limit)
        self._streams: dict[str, Stream] = {}
        self._numbers = itertools.count(1)
        self.refused = 0

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    # --- its verifiers --------------------------------------------------------------------------

    def opened(self, verifier: SimVerifier) -> None:
        candidate = Candidate(verifier.hello, stream=next(self._numbers))
        self._streams[verifier.hello.instance_id] = Stream(verifier, candidate)
        self._pump()

    def closed(self, instance_id: str) -> None:
        """A verifier was lost: what ran there is placed anew, ahead of all new ones."""
        stream = self._streams.pop(instance_id)
        for request in stream.seats.values():
            avoid = request.wanted.avoid | {stream.candidate.stream}
            self._look(request, replace(request.wanted, avoid=avoid))
            self._queue.rejoin(request)
        self._pump()

    def beat(self, instance_id: str, heartbeat: Heartbeat) -> None:
        stream = self._streams.get(instance_id)
        if stream is not None:
            seated = len(stream.seats)
            stream.candidate = replace(stream.candidate, beat=heartbeat, seated_at_beat=seated)
            self._pump()

    # --- requests -------------------------------------------------------------------------------

    def submit(self, turn: Turn) -> Request:
        """As `RouterService` and `Generation` do: guess, look where the session is, wait."""
        now_s, scenario = self._env.now, self._scenario
        told = turn.output_tokens if scenario.length_predictor == "max-tokens" else MAX_TOKENS
        sampling = SamplingParams(max_tokens=told)
        expected = self._lengths.expect((turn.tenant, MODEL, ""), turn.prompt, sampling)
        left = expected.left(0) if expected else None
        rank = rank_of(scenario.queue_order, now_s, left, scenario.give_way_s)
        share = Share(turn.tenant, 0, turn.prompt_tokens + told, rank)
        wanted = Wanted(MODEL, "r", f"{turn.session}/{turn.number}")
        session: Session = NoSession()
        if scenario.affinity:
            session = LeasedSession(self._leases, turn.tenant, turn.session)
        request = Request(
            turn, now_s, self._env.event(), session, expected, share, wanted, Whereabouts()
        )
        self._look(request, wanted)
        try:
            pushed_out = self._queue.join(request, share)
        except Overloaded:
            self._refuse(request)
        else:
            if pushed_out is not None:
                self._refuse(pushed_out)
            self._pump()
        return request

    def _look(self, request: Request, wanted: Wanted) -> None:
        request.where = at_once(request.session.look())
        near: tuple[str, ...] = ()
        if self._scenario.affinity and not request.where.holder:
            near = at_once(self._prefixes.find(request.turn.tenant, request.turn.prompt))
        request.wanted = replace(wanted, holder=request.where.holder, prefix_holders=near)

    def _refuse(self, request: Request) -> None:
        self.refused += 1
        request.done.succeed()

    def _candidates(self) -> list[Candidate]:
        return [stream.candidate for stream in self._streams.values()]

    def _pump(self) -> None:
        """Seat whoever can be seated; those whose session has moved look for it and wait again."""
        moved = []
        if not self._queue:
            return
        for request, placement in turns(self._queue, self._candidates):
            if placement is not None:
                self._queue.leave(request)
                if not self._seat(request, placement):
                    moved.append(request)
        for request in moved:
            self._look(request, request.wanted)
            self._queue.rejoin(request)
        if moved:
            self._pump()

    def _seat(self, request: Request, placement: Placement) -> bool:
        if not request.placements:
            self._queue.charge(request.share, request.share.cost)
        request.placements += 1
        taken = at_once(request.session.take(placement.instance_id, request.where))
        if taken is None:
            return False
        request.by = request.by or placement.by
        stream = self._streams[placement.instance_id]
        stream.seats[id(request)] = request
        self._show_seats(stream)
        if self._scenario.affinity:
            turn = request.turn
            at_once(self._prefixes.note(turn.tenant, turn.prompt, placement.instance_id))
        request.serving = Serving(
            request.turn.names,
            request.turn.prompt_tokens + request.committed,
            request.turn.output_tokens - request.committed,
            self._comer(request, stream),
        )
        if stream.verifier.alive:
            stream.verifier.start(request.serving)
        return True

    def _comer(self, request: Request, stream: Stream) -> Callable[[int], None]:
        def came(num_tokens: int) -> None:
            request.committed += num_tokens
            if request.first_s is None:
                request.first_s = self._env.now
            if request.committed == request.turn.output_tokens:
                self._finish(request, stream)

        return came

    def _finish(self, request: Request, stream: Stream) -> None:
        turn = request.turn
        request.ended_s = self._env.now
        del stream.seats[id(request)]
        self._show_seats(stream)
        whose = (turn.tenant, MODEL, "")
        self._lengths.learn(whose, request.expected, turn.output_tokens, FinishReason.STOP_TOKEN)
        spent = turn.prompt_tokens + turn.output_tokens
        self._queue.charge(request.share, spent - request.share.cost)
        at_once(request.session.end())
        request.done.succeed()
        self._pump()

    def _show_seats(self, stream: Stream) -> None:
        stream.candidate = replace(stream.candidate, seated=len(stream.seats))


def _predictor(scenario: Scenario) -> LengthPredictor:
    """Features of one secret, so that a seed gives the same run."""
    if scenario.length_predictor == "history":
        return HistoryPredictor(scenario.seed)
    return predictor_of(scenario.length_predictor)
