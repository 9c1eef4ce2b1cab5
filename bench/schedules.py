"""What it is worth to let shorter requests go first: `python -m treecast.bench.schedules`.

The verifier's own scheduler over the toy engine, without wire and threads; time is counted in
steps, so that the machine does not matter. Requests come at random; 15% of the outputs are long.
Lengths are foretold exactly, within a factor of two or so, or not at all.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from treecast.engine.base import LogitRows
from treecast.engine.curve import StepCurve
from treecast.engine.toy import ToyEngine
from treecast.sampling.laws import acceptance_rule, walk
from treecast.sampling.params import Law, SamplingParams
from treecast.sampling.pick import Picker
from treecast.sampling.stops import StopRules
from treecast.sampling.transforms import Context
from treecast.services.verifier.assignments import Assignments
from treecast.services.verifier.choice import TreePolicy
from treecast.services.verifier.endings import Endings
from treecast.services.verifier.metrics import VerifierMetrics
from treecast.services.verifier.pace import Goodput
from treecast.services.verifier.plan import Work, plan
from treecast.services.verifier.requests import Request
from treecast.services.verifier.scheduler import Scheduler
from treecast.services.verifier.sessions import SessionStore
from treecast.services.verifier.settings import VerifierSettings
from treecast.services.verifier.spans import RequestSpans
from treecast.telemetry.traces import open_tracing
from treecast.tree import TokenTree
from treecast.wire.frames import SessionKey, Start

VOCAB = 97

Foretold = Literal["not", "exactly", "roughly"]


class Sink:
    """A router that only remembers what it is sent."""

    def __init__(self) -> None:
        self.sent: list[object] = []

    def send(self, frame: object) -> None:
        self.sent.append(frame)


class BareLoop:
    """A step loop without wire, threads and trees.

    Attributes:
        ran: steps that each request had a part in, by handle.
    """

    def __init__(self, pool_tokens: int, **settings: Any) -> None:
        self.engine = ToyEngine(vocab_size=VOCAB, pool_tokens=pool_tokens)
        self.settings = VerifierSettings(engine="toy", **settings)
        self.metrics = VerifierMetrics()
        self.sessions = SessionStore(self.engine, 600, self.metrics.memory.evicted)
        self.router = Sink()
        self.ran: Counter[int] = Counter()
        self._curve = StepCurve({1: 0.001, 2: 0.002})
        policy = TreePolicy(self.metrics.choice, 0)
        assignments = Assignments(policy, self.settings.max_nodes, (), self.metrics.trees)
        spans = RequestSpans(open_tracing(None, "verifier", "schedules"))
        self.scheduler = Scheduler(
            self.engine,
            self.settings,
            self.sessions,
            assignments,
            self._curve,
            Goodput(1000.0),
            self.metrics,
            spans,
        )
        self.roster = self.scheduler.roster
        self.endings = Endings(
            self.roster,
            self.sessions,
            self.scheduler.swap,
            assignments,
            self.metrics.requests,
            spans,
        )
        self._handles = itertools.count(1)

    def submit(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        session: SessionKey | None = None,
        **start: Any,
    ) -> Request:
        """Queue a greedy request.

        Raises:
            Overloaded: as the scheduler says.
        """
        handle, sampling = next(self._handles), SamplingParams(temperature=0, max_tokens=max_tokens)
        request = Request(
            handle=handle,
            start=Start(handle, str(handle), tuple(prompt), sampling, 0, session=session, **start),
            link=self.router,  # type: ignore[arg-type]
            tokens=list(prompt),
            prompt_len=len(prompt),
            law=acceptance_rule(Law.REPLAY),
            picker=Picker(sampling, 0, Context(prompt)),
            stops=StopRules(frozenset(), sampling, None),
            deadline=None,
        )
        self.scheduler.submit(request)
        return request

    def step(self, number: int) -> None:
        """One step of the loop."""
        self.arrange(number)
        self.compute()

    def arrange(self, number: int) -> None:
        """End what was cancelled, and say who runs."""
        self.endings.reap(self.engine.usage, self.settings.max_running)
        self.scheduler.arrange(number)

    def compute(self) -> None:
        """Plan, forward, walk and commit, for those who run."""
        running = self.roster.running
        trees = [TokenTree() for _ in running]
        batch = plan(running, trees, self._curve, self.settings.max_rows, 0.0)
        if batch:
            logits = self.engine.forward([work.segment() for work in batch])
            for work, rows in zip(batch, logits, strict=True):
                self._commit(work, rows)

    def _commit(self, work: Work, rows: LogitRows) -> None:
        request = work.request
        assert request.sequence is not None
        self.ran[request.handle] += 1
        walked = None
        if work.samples:
            walked = walk(work.tree, rows, request.picker, request.stops.check, request.law)
        self.engine.commit(request.sequence, work.path(walked.accepted if walked else ()))
        if walked is not None:
            request.tokens.extend(walked.tokens)
        if walked is not None and walked.stop is not None:
            self.endings.finish(request, walked.stop)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to come: when, how long its output is, and is said to be."""

    at: int
    num_tokens: int
    foretold: int | None


def traffic(seed: int, count: int, foretold: Foretold) -> list[Arrival]:
    """Outputs of 8 to 40 tokens, and of 300 each seventh time or so; one comes each 14 steps."""
    rng = random.Random(seed)
    arrivals, at = [], 0.0
    for _ in range(count):
        at += rng.expovariate(1 / 14)
        length = 300 if rng.random() < 0.15 else rng.randint(8, 40)
        error = rng.lognormvariate(0, 0.7)
        guess = {"not": None, "exactly": length, "roughly": max(1, round(length * error))}
        arrivals.append(Arrival(int(at), length, guess[foretold]))
    return arrivals


@dataclass(frozen=True, slots=True)
class Served:
    """Steps from arrival to end, request by request, and the same per token of its output."""

    steps: list[int]
    per_token: list[float]
    preemptions: float


def serve(arrivals: Sequence[Arrival], schedule: str) -> Served:
    """Serve all of them, four at a time."""
    loop = BareLoop(
        64 * 24, max_running=4, max_waiting=len(arrivals), schedule=schedule, max_rows=64
    )
    coming, there = list(arrivals), dict[int, tuple[Arrival, Request]]()
    steps: list[int] = []
    per_token: list[float] = []
    for number in itertools.count():
        while coming and coming[0].at <= number:
            arrival, prompt = coming.pop(0), [len(coming) % VOCAB, 1]
            request = loop.submit(prompt, arrival.num_tokens, expected_tokens=arrival.foretold)
            there[request.handle] = arrival, request
        if not coming and not there:
            break
        if there:
            loop.step(number)
        for handle, (arrival, request) in list(there.items()):
            if request.tokens_left == 0:
                del there[handle]
                steps.append(number + 1 - arrival.at)
                per_token.append(steps[-1] / arrival.num_tokens)
    name = "treecast_verifier_preemptions_total"
    preemptions = loop.metrics.registry.get_sample_value(name, {"why": "length"}) or 0.0
    return Served(steps, per_token, preemptions)


def report(count: int, seeds: int) -> Table:
    """A row per schedule and foresight, over the same arrivals."""
    table = Table(title=f"{seeds} x {count} requests, 4 at a time; in steps")
    for name in ("schedule", "foretold", "mean", "median", "longest", "per token", "preemptions"):
        table.add_column(name, justify="left" if name in ("schedule", "foretold") else "right")
    cases: list[tuple[str, Foretold]] = [
        ("fcfs", "not"),
        ("length", "exactly"),
        ("length", "roughly"),
        ("length", "not"),
    ]
    for schedule, foretold in cases:
        runs = [serve(traffic(seed, count, foretold), schedule) for seed in range(seeds)]
        steps = sorted(itertools.chain.from_iterable(run.steps for run in runs))
        per_token = fmean(itertools.chain.from_iterable(run.per_token for run in runs))
        table.add_row(
            schedule,
            foretold,
            f"{fmean(steps):.0f}",
            str(steps[len(steps) // 2]),
            str(steps[-1]),
            f"{per_token:.2f}",
            f"{sum(run.preemptions for run in runs):.0f}",
        )
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=60, help="of one run")
    parser.add_argument("--seeds", type=int, default=3, help="runs")
    given = parser.parse_args(argv)
    Console().print(report(given.requests, given.seeds))


if __name__ == "__main__":
    main()
