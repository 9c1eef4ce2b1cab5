"""One run: verifiers, routers, clients, losses, in one simulated clock."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import simpy

from treecast.services.router.placement import PlacedBy
from treecast.wire.link import HEARTBEAT_S, SILENCE_S

from .router import Request, SimRouter, hello_of
from .scenario import Scenario
from .state import MemoryLeases, MemoryPrefixes
from .verifier import SimVerifier
from .workload import Session, Workload

LEASE_TTL_S = 600.0

Process = Generator[simpy.Event, None, None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to; times in seconds, over the requests that were counted.

    Attributes:
        busy: share of their time that verifiers spent in steps while requests came.
        hit: share of later turns that were placed where their session is.
        cached: share of prompt tokens that were not computed again.
        queued_mean, queued_max: requests in the queues of all routers together.
        doublings: how far off the guesses of lengths were, on average; nan without.
    """

    requests: int
    refused: int
    moved: int
    busy: float
    latency_mean_s: float
    latency_p50_s: float
    latency_p99_s: float
    first_p50_s: float
    first_p99_s: float
    token_mean_ms: float
    token_p99_ms: float
    hit: float
    cached: float
    queued_mean: float
    queued_max: int
    doublings: float


class World:
    """Everything that happens in a scenario; `run` it once."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self.env = env = simpy.Environment()
        self._rng = np.random.default_rng((scenario.seed, 0))
        self._workload = Workload(scenario)
        leases = MemoryLeases(lambda: env.now, LEASE_TTL_S)
        prefixes = MemoryPrefixes(lambda: env.now, LEASE_TTL_S)
        self.routers = [SimRouter(env, scenario, leases, prefixes) for _ in range(scenario.routers)]
        self.requests: list[Request] = []
        self._verifiers: list[SimVerifier] = []
        self._gone_busy_s = 0.0
        self._queued: list[int] = []
        self._serials = iter(range(10**9))

    def run(self) -> Outcome:
        """Until all requests that came have ended."""
        env, scenario = self.env, self._scenario
        for _ in range(scenario.verifiers):
            self._begin_verifier()
        clients = env.process(self._clients())
        env.process(self._watch_queues())
        if scenario.lose_every_s:
            env.process(self._losses())
        env.run(until=scenario.seconds)
        busy = self._busy_s / (scenario.verifiers * scenario.seconds)
        env.run(until=clients)
        return self._outcome(busy)

    @property
    def _busy_s(self) -> float:
        return self._gone_busy_s + sum(one.busy_s for one in self._verifiers)

    # --- who lives here -------------------------------------------------------------------------

    def _begin_verifier(self) -> None:
        hello = hello_of(f"verifier-{next(self._serials)}", self._scenario)
        verifier = SimVerifier(self.env, self._scenario, hello)
        self._verifiers.append(verifier)
        for router in self.routers:
            router.opened(verifier)
        self.env.process(self._beat(verifier))

    def _beat(self, verifier: SimVerifier) -> Process:
        """To all routers, every so often, from a time of its own on."""
        yield self.env.timeout(self._rng.uniform(0, HEARTBEAT_S))
        while verifier.alive:
            heartbeat = verifier.heartbeat()
            for router in self.routers:
                router.beat(verifier.hello.instance_id, heartbeat)
            yield self.env.timeout(HEARTBEAT_S)

    def _losses(self) -> Process:
        while True:
            yield self.env.timeout(self._rng.exponential(self._scenario.lose_every_s))
            if self._verifiers:
                at = int(self._rng.integers(len(self._verifiers)))
                self.env.process(self._lose(self._verifiers.pop(at)))

    def _lose(self, verifier: SimVerifier) -> Process:
        verifier.lose()
        self._gone_busy_s += verifier.busy_s
        yield self.env.timeout(SILENCE_S)
        for router in self.routers:
            router.closed(verifier.hello.instance_id)
        yield self.env.timeout(self._scenario.restart_s)
        self._begin_verifier()

    def _clients(self) -> Process:
        sessions = []
        while True:
            yield self.env.timeout(self._workload.gap_s())
            if self.env.now >= self._scenario.seconds:
                break
            sessions.append(self.env.process(self._converse(self._workload.session())))
        yield self.env.all_of(sessions)

    def _converse(self, session: Session) -> Process:
        """Turn after turn, each through any router, with time to think between."""
        while self.env.now < self._scenario.seconds and (turn := session.turn()) is not None:
            router = self.routers[int(self._rng.integers(len(self.routers)))]
            request = router.submit(turn)
            self.requests.append(request)
            yield request.done
            if request.ended_s is None:
                return  # refused; the client gives up
            yield self.env.timeout(self._rng.exponential(self._scenario.think_s))

    def _watch_queues(self) -> Process:
        while self.env.now < self._scenario.seconds:
            self._queued.append(sum(router.num_waiting for router in self.routers))
            yield self.env.timeout(HEARTBEAT_S)

    # --- what came of it ------------------------------------------------------------------------

    def _outcome(self, busy: float) -> Outcome:
        counted = [one for one in self.requests if one.arrived_s >= self._scenario.warm_up_s]
        ended = [one for one in counted if one.ended_s is not None]
        if not ended:
            raise ValueError(f"no request ended of {len(self.requests)}; simulate for longer")
        whole = np.array([_latency_s(one) for one in ended])
        first = np.array([(one.first_s or 0.0) - one.arrived_s for one in ended])
        tokens = whole / np.array([one.turn.output_tokens for one in ended])
        later = [one for one in ended if one.turn.number > 1]
        hits = sum(one.by is PlacedBy.AFFINITY for one in later)
        cached = sum(one.serving.cached_tokens for one in ended if one.serving)
        off = [one.expected.doublings(one.turn.output_tokens) for one in ended if one.expected]
        return Outcome(
            requests=len(ended),
            refused=len(counted) - len(ended),
            moved=sum(one.placements > 1 for one in ended),
            busy=busy,
            latency_mean_s=float(whole.mean()),
            latency_p50_s=float(np.percentile(whole, 50)),
            latency_p99_s=float(np.percentile(whole, 99)),
            first_p50_s=float(np.percentile(first, 50)),
            first_p99_s=float(np.percentile(first, 99)),
            token_mean_ms=float(1000 * tokens.mean()),
            token_p99_ms=float(1000 * np.percentile(tokens, 99)),
            hit=hits / len(later) if later else float("nan"),
            cached=cached / sum(one.turn.prompt_tokens for one in ended),
            queued_mean=float(np.mean(self._queued)),
            queued_max=max(self._queued),
            doublings=float(np.mean(off)) if off else float("nan"),
        )


def _latency_s(request: Request) -> float:
    assert request.ended_s is not None
    return request.ended_s - request.arrived_s


def simulate(scenario: Scenario) -> Outcome:
    """Run a scenario; the same one always comes to the same outcome.

    Raises:
        ValueError: no request was counted.
    """
    return World(scenario).run()
