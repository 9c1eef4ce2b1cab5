"""The verifier's own step loop over the toy engine, without wire, threads and trees.

`schedules.py` times it in steps, and `tests/unit/test_scheduler.py` checks it at each.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

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
from treecast.services.verifier.goodput import Goodput
from treecast.services.verifier.metrics import VerifierMetrics
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
