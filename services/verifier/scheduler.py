"""Carries out whose turn it is: begins, pauses and resumes requests at step boundaries."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from treecast.engine.base import Engine
from treecast.engine.curve import StepCurve
from treecast.errors import Overloaded
from treecast.settings import GIB

from .assignments import Assignments
from .goodput import Goodput
from .metrics import VerifierMetrics
from .requests import Request, Roster
from .room import KVRoom
from .schedule import Choice, Claim, Policy, State, by_length, choose, expected_output, fcfs
from .sessions import SessionStore
from .settings import VerifierSettings
from .spans import RequestSpans
from .swapping import SwapSpace

REVIEW_STEPS = 8
"""Steps between two looks at whether others should run, while all slots are taken."""


class Scheduler:
    """Who runs, of all requests; `schedule` decides, this does it.

    Attributes:
        roster: the requests; changed here, by `submit`, and by whoever ends them.
        room: their pages.
    """

    def __init__(
        self,
        engine: Engine,
        settings: VerifierSettings,
        sessions: SessionStore,
        assignments: Assignments,
        curve: StepCurve,
        goodput: Goodput,
        metrics: VerifierMetrics,
        spans: RequestSpans,
    ) -> None:
        self.roster = Roster()
        self.swap = SwapSpace(engine, int(settings.swap_gib * GIB), metrics.memory)
        self.room = KVRoom(engine, self.roster, sessions, self.swap, settings.max_nodes)
        self._settings = settings
        self._assignments = assignments
        self._curve = curve
        self._goodput = goodput
        self._metrics = metrics
        self._spans = spans
        by_time = settings.schedule == "length"
        self._policy: Policy = by_length(settings.aging_s) if by_time else fcfs
        self._review_steps = REVIEW_STEPS if by_time else math.inf
        self._reviewed = 0
        self._blocked = False
        self._looked_at = 0  # requests that there were when it was last asked who runs

    def submit(self, request: Request) -> None:
        """Queue a request for the next step.

        Raises:
            Overloaded: too many are there.
            PromptTooLong: the pool is too small for it.
        """
        self.room.check_fits(request)
        self.check_places()
        self.roster.waiting.append(request)
        self._blocked = False

    def check_places(self, num_others: int = 0) -> None:
        """Raises Overloaded: too many are there, counting others on their way."""
        slots, places = self._settings.max_running, self._settings.max_waiting
        running, total = len(self.roster.running), len(self.roster) + num_others
        if total >= slots + places:
            raise Overloaded(
                f"{running} requests are running and {total - running} waiting; "
                f"the limits are {slots} and {places}"
            )

    @property
    def may_admit(self) -> bool:
        """Whether somebody waits who may find room, or a sibling's prompt, at the next step."""
        left = len(self.roster) < self._looked_at
        return bool(self.roster.waiting) and (left or not self._blocked)

    def prompt_computed(self) -> None:
        """A request has decoded its first token: siblings may have waited for its prompt."""
        self._blocked = False

    def arrange(self, step: int) -> None:
        """Pause, begin and resume requests for a step, and give whoever runs its room."""
        self._blocked, self._looked_at = True, len(self.roster)
        if self._goes_on(step):
            self._keep(self.roster.running)
        else:
            self._change(step)
        self._bring_ahead()
        for request in self.roster.running:
            self.room.give_ahead(request)

    def _goes_on(self, step: int) -> bool:
        """Whether the next step is for those who run now, without asking."""
        roster, fresh = self.roster, step - self._reviewed < self._review_steps
        full = len(roster.running) == self._settings.max_running and fresh
        return (full or not (roster.waiting or roster.paused)) and self.room.suffices

    def _change(self, step: int) -> None:
        now, self._reviewed = time.monotonic(), step
        requests = {request.handle: request for request in self.roster}
        claims = [self._claim(request, step, now) for request in requests.values()]
        choice = self._choose(claims, requests)
        while not choice.run and self.room.put_out_last():
            choice = self._choose(claims, requests)
        for claim in choice.preempted:
            why = "memory" if claim.handle in choice.short_of_pages else "length"
            self.pause(requests[claim.handle], why)
        ranks = {claim.handle: self._policy(claim) for claim in claims}
        self.roster.paused.sort(key=lambda request: ranks[request.handle])
        self._run([requests[claim.handle] for claim in choice.run], step)

    def _choose(self, claims: Sequence[Claim], requests: dict[int, Request]) -> Choice:
        return choose(
            claims,
            self._policy,
            self._settings.max_running,
            self.room.num_pages,
            lambda claim: self.room.cost(requests[claim.handle]),
        )

    def _run(self, chosen: Sequence[Request], step: int) -> None:
        """Give those chosen their room, best rank first: who runs, then who begins or goes on."""
        running = [request for request in chosen if request.state is State.RUNNING]
        self._keep(running)
        for request in chosen:
            if request not in running and not self._begin(request, step):
                break
        order = {request.handle: place for place, request in enumerate(chosen)}
        self.roster.running.sort(key=lambda request: order[request.handle])

    def _keep(self, running: Sequence[Request]) -> None:
        """Give requests that run on the room for their next token."""
        for request in list(running):
            try:
                self.room.give(request)
            except Overloaded:  # pages that were thought free are shared
                self.pause(request, "memory")

    def _begin(self, request: Request, step: int) -> bool:
        """Let a request begin, or go on; False if there are no pages for it after all."""
        try:
            if not self.room.give(request):
                return True
        except Overloaded:
            return False
        self.roster.remove(request)
        if request.state is State.WAITING:
            request.go_on(step)
            self._metrics.requests.wait.observe(request.admitted_at - request.arrived_at)
            self._spans.admitted(request)
        else:
            request.go_on(step)
        self.roster.running.append(request)
        self._assignments.admit(request)
        return True

    def pause(self, request: Request, why: str) -> None:
        """Let a request run no more for now; its KV stays while nobody needs the pages."""
        self.roster.running.remove(request)
        request.pause()
        self.roster.paused.append(request)
        self._assignments.release(request)
        self.room.give_back_ahead(request)
        self._metrics.requests.preemptions.labels(why).inc()

    def _bring_ahead(self) -> None:
        """The paused request whose turn comes next has its KV back when it does."""
        if self.roster.paused:
            self.room.bring_ahead(self.roster.paused[0])

    def _claim(self, request: Request, step: int, now: float) -> Claim:
        idle_s = 0.0 if request.idle_since is None else now - request.idle_since
        return Claim(
            request.handle,
            request.state,
            request.start.priority,
            self._remaining_s(request),
            request.idle_s + idle_s,
            step - request.began_step,
        )

    def _remaining_s(self, request: Request) -> float:
        """What is expected of its output, and what is not computed of its text, in seconds."""
        most = request.start.sampling.max_tokens
        expected = expected_output(request.start.expected_tokens, request.num_output, most)
        pending = len(request.tokens) - request.num_computed
        row_s = self._curve(2) - self._curve(1)
        return (expected - request.num_output) / self._goodput.tokens_per_s + pending * row_s
