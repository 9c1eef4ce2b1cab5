"""The verifier's clock: collect, plan, forward, walk, commit.

Everything but the forward pass and the picks runs on the event loop; those two run on the
engine's own thread. Only this loop touches the KV pool, and only between forwards.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import structlog

from treecast.engine.base import Engine, LogitRows
from treecast.engine.curve import StepCurve
from treecast.errors import EngineLost, TreecastError
from treecast.sampling.laws import Walk, walk
from treecast.telemetry.traces import Tracing
from treecast.wire.frames import Heartbeat, SessionKey
from treecast.wire.link import SILENCE_S

from .assignments import Assignments
from .attachments import Owed
from .endings import Endings
from .goodput import PROBE_STEPS, RARE_PROBE_STEPS, Goodput, worth_waiting
from .metrics import VerifierMetrics
from .plan import Work, plan
from .reporting import Reporter
from .requests import Request
from .rounds import StepTimes
from .scheduler import Scheduler
from .sessions import SessionStore
from .settings import VerifierSettings
from .spans import RequestSpans
from .speculation import Speculation

log = structlog.get_logger()


class StepLoop:
    """Continuous batching: every step takes whatever requests there are.

    `submit`, `cancel` and `forget` are called from the event loop at any time and take effect at
    the next step boundary.
    """

    def __init__(
        self,
        engine: Engine,
        thread: ThreadPoolExecutor,
        settings: VerifierSettings,
        assignments: Assignments,
        speculation: Speculation,
        curve: StepCurve,
        metrics: VerifierMetrics,
        tracing: Tracing,
    ) -> None:
        self._engine = engine
        self._thread = thread
        self._settings = settings
        self._assignments = assignments
        self._speculation = speculation
        self._metrics = metrics
        spans = RequestSpans(tracing)
        self._reporter = Reporter(speculation, metrics, spans)
        self.curve = curve
        self._goodput = Goodput(1 / curve(1))
        self._times = StepTimes()
        self.sessions = SessionStore(engine, settings.session_ttl_s, metrics.memory.evicted)
        self._scheduler = Scheduler(
            engine,
            settings,
            self.sessions,
            assignments,
            curve,
            self._goodput,
            metrics,
            spans,
        )
        self._roster, swap = self._scheduler.roster, self._scheduler.swap
        self._endings = Endings(
            self._roster, self.sessions, swap, assignments, metrics.requests, spans
        )
        self._forgotten: list[SessionKey] = []
        self._handing_over = False
        self._wake = asyncio.Event()
        self._rest = asyncio.Event()
        self._steps = 0
        self._step_began: float | None = None
        self._predicted_s = 0.0
        assignments.on_tree = self._wake.set
        self._show()

    # --- from the event loop, at any time -------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request for the next step.

        Raises:
            Overloaded: too many are waiting.
            PromptTooLong: the pool is too small for it.
            StaleLease: the session has moved on.
        """
        if request.start.session is not None:
            self.sessions.check_epoch(request.start.session)
        request.handed_over = self._handing_over
        self._scheduler.submit(request)
        self._rest.clear()
        self._wake.set()

    def check_places(self, num_others: int) -> None:
        """Raises Overloaded: too many are here, counting others that have not been submitted."""
        self._scheduler.check_places(num_others)

    def cancel(self, request: Request) -> None:
        """End a request at the next step boundary; its pages are free then."""
        request.cancelled = True
        self._wake.set()

    def forget(self, session: SessionKey) -> None:
        """Free what a session retains."""
        self._forgotten.append(session)
        self._wake.set()

    def hand_over(self) -> None:
        """End all requests at the next step boundary, for their routers to place elsewhere, and so
        those that come later.
        """
        self._handing_over = True
        for request in self._roster:
            request.handed_over = True
        self._wake.set()

    def keep(self) -> None:
        """Hand nothing over any more."""
        self._handing_over = False

    @property
    def num_requests(self) -> int:
        """Running, paused and waiting."""
        return len(self._roster)

    async def finished(self) -> None:
        """Wait until no request is left."""
        await self._rest.wait()

    def heartbeat(self, num_preparing: int, draining: bool) -> Heartbeat:
        """How the loop fares, for peers, and how many requests are on their way to it."""
        usage = self._engine.usage
        began = self._step_began
        return Heartbeat(
            steps=self._steps,
            step_age_ms=0 if began is None else int(1000 * (time.monotonic() - began)),
            step_predicted_ms=int(1000 * self._predicted_s),
            free_capacity=0 if draining else self._free_slots(),
            running=len(self._roster.running),
            waiting=len(self._roster.waiting) + len(self._roster.paused) + num_preparing,
            kv_pages_free=usage.free,
            kv_pages_total=usage.total,
            draining=draining,
        )

    def _free_slots(self) -> int:
        return max(0, self._settings.capacity - len(self._roster))

    # --- the loop -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Step for ever; cancel the task to stop, at a step boundary.

        Raises:
            EngineLost: the engine can do nothing any more.
        """
        while True:
            await self._await_work()
            with self._timed("collect"):
                await asyncio.sleep(0)  # let frames that have arrived be handled
                await self._wait_for_trees()
            with self._timed("plan"):
                batch = self._plan()
            if not batch:
                continue
            try:
                with self._timed("forward"):
                    logits = await self._forward(batch)
                with self._timed("walk"):
                    walks = await self._walk(batch, logits)
            except EngineLost:
                raise  # routers place what is running elsewhere, once our streams are closed
            except Exception as error:
                self._endings.fail((work.request for work in batch), error)
                continue
            with self._timed("commit"):
                self._commit(batch, walks)

    async def _await_work(self) -> None:
        """Rest while there is no request and nothing to forget."""
        self._wake.clear()
        while not len(self._roster) and not self._forgotten:
            self._rest.set()
            try:
                await asyncio.wait_for(self._wake.wait(), timeout=1.0)
            except TimeoutError:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.check)
            self._wake.clear()
            self.sessions.expire()
            self._times.began = time.monotonic()

    async def _wait_for_trees(self) -> None:
        """Trees of a running batch are waited for while they are worth it, but no newcomer is
        made to wait for them.
        """
        if not self._owed():
            return
        with self._metrics.steps.draft_wait.time():
            await self._wait_while_worth()

    async def _wait_while_worth(self) -> None:
        began = time.monotonic()
        patience_s = cap_s = self._longest_wait_s()
        while not self._scheduler.may_admit and self._worth_waiting(cap_s, cap_s - patience_s):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), timeout=patience_s)
            self._wake.clear()
            patience_s = cap_s - (time.monotonic() - began)
            if patience_s <= 0:
                self._speculation.waited_in_vain(self._roster.running, cap_s)
                return

    def _longest_wait_s(self) -> float:
        return SILENCE_S if self._takes_its_time else self.curve(len(self._roster.running))

    def _worth_waiting(self, cap_s: float, waited_s: float) -> bool:
        """Whether the trees owed are expected to add more tokens than the wait costs.

        Now and then it waits anyway, so that what trees are worth stays known. Those that are made
        on our own cores were asked for because they pay, and a step beside them is a slow one.
        """
        owed = self._owed()
        if not owed or any(request.cancelled for request in self._roster.running):
            return False
        if self._takes_its_time or any(item.shares_cores for item in owed):
            return True
        gain = sum(item.gain_tokens for item in owed)
        left_s = max(item.latency_s for item in owed) - waited_s
        too_late = left_s > cap_s - waited_s
        probing = self._steps % (RARE_PROBE_STEPS if too_late else PROBE_STEPS) == 0
        rate = self._price * len(self._roster.running)
        return probing or worth_waiting(gain, rate, left_s, cap_s - waited_s)

    def _owed(self) -> list[Owed]:
        """Trees to wait for: those that are a draft away, or all, if the planner takes its time."""
        return self._speculation.owed(self._roster.running, reading=self._takes_its_time)

    @property
    def _takes_its_time(self) -> bool:
        return self._settings.planner == "full"

    @property
    def _price(self) -> float:
        """Tokens that a second is worth to each request; the planner `full` takes its time."""
        return 0.0 if self._takes_its_time else self._goodput.tokens_per_s

    def _plan(self) -> list[Work]:
        """Drop what has ended, say who runs, and divide the step's rows."""
        self._endings.reap(self._engine.usage, self._settings.max_running)
        for session in self._forgotten:
            self.sessions.forget(session)
        self._forgotten.clear()
        self.sessions.expire()
        self._scheduler.arrange(self._steps)
        self._assignments.rearrange()
        running, room = self._roster.running, self._scheduler.room
        trees = [self._speculation.tree(request, room.for_tree(request)) for request in running]
        price = self._price * len(running)
        self._assignments.judge(price)
        batch = plan(running, trees, self.curve, self._settings.max_rows, price)
        sampled = {work.request for work in batch if work.samples}
        at_hand = sum(len(t) for r, t in zip(running, trees, strict=True) if r in sampled)
        self._metrics.steps.planned(at_hand, (work.tree for work in batch))
        return batch

    async def _forward(self, batch: Sequence[Work]) -> list[LogitRows]:
        """One packed pass on the engine's thread."""
        rows = sum(work.num_rows for work in batch)
        segments = [work.segment() for work in batch]
        self._metrics.steps.batch_size.observe(len(batch))
        self._metrics.steps.batch_rows.observe(rows)
        self._times.forward = self._step_began = time.monotonic()
        self._predicted_s = self.curve(rows)
        try:
            loop = asyncio.get_running_loop()
            logits = await loop.run_in_executor(self._thread, self._engine.forward, segments)
            self.curve.saw(rows, time.monotonic() - self._times.forward)
            return logits
        finally:
            self._step_began = None
            self._steps += 1

    async def _walk(
        self, batch: Sequence[Work], logits: Sequence[LogitRows]
    ) -> list[Walk | TreecastError | None]:
        """Follow each request's law along its tree, on the engine's thread: picks can be costly."""

        def walk_all() -> list[Walk | TreecastError | None]:
            return [_walk_one(work, rows) for work, rows in zip(batch, logits, strict=True)]

        return await asyncio.get_running_loop().run_in_executor(self._thread, walk_all)

    def _commit(self, batch: Sequence[Work], walks: Sequence[Walk | TreecastError | None]) -> None:
        """Keep the accepted paths' KV; tell speculators and routers; end what has finished."""
        self._measure(batch, walks)
        for work, walked in zip(batch, walks, strict=True):
            request = work.request
            if isinstance(walked, TreecastError):
                self._endings.abandon(request, walked)
                continue
            assert request.sequence is not None
            accepted = () if walked is None else walked.accepted
            self._engine.commit(request.sequence, work.path(accepted))
            self._metrics.steps.prefill_tokens.inc(work.num_pending - (walked is not None))
            if walked is not None:
                self._tell(work, walked)
        self._times.began = self._times.ended

    def _measure(self, batch: Sequence[Work], walks: Sequence[Walk | TreecastError | None]) -> None:
        """How much came out since the last step; those with prompts in them say nothing."""
        self._times.ended = time.monotonic()
        took_s = self._times.ended - self._times.began
        counts = [len(walked.tokens) for walked in walks if isinstance(walked, Walk)]
        if counts and all(work.num_pending == 1 for work in batch):
            self._goodput.saw(sum(counts), len(counts), took_s)
        self._assignments.tokens_per_s = self._price
        self._metrics.steps.goodput.set(self._price)

    def _tell(self, work: Work, walked: Walk) -> None:
        request = work.request
        if request.last_commit_at is None:
            self._scheduler.prompt_computed()
        self._reporter.tell(work, walked, self._times)
        if walked.stop is not None:
            self._endings.finish(request, walked.stop)

    def _show(self) -> None:
        """Gauges are read when they are asked for: between two requests nothing would set them."""
        requests, memory, engine = self._metrics.requests, self._metrics.memory, self._engine
        requests.running.set_function(lambda: len(self._roster.running))
        requests.waiting.set_function(lambda: len(self._roster.waiting))
        requests.paused.set_function(lambda: len(self._roster.paused))
        memory.pages.labels("free").set_function(lambda: engine.usage.free)
        memory.pages.labels("used").set_function(lambda: engine.usage.used)
        memory.swapped.set_function(lambda: self._scheduler.swap.used_bytes)
        memory.retained.set_function(lambda: len(self.sessions))

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        with self._metrics.steps.phase.labels(phase).time():
            yield

    def close(self) -> None:
        """Stop the engine's thread once its work is done. Blocks."""
        self._thread.shutdown(wait=True)


def _walk_one(work: Work, rows: LogitRows) -> Walk | TreecastError | None:
    """One request's walk; a row that the model broke down on is that request's error alone."""
    if not work.samples:
        return None
    request = work.request
    try:
        return walk(work.tree, rows, request.picker, request.stops.check, request.law)
    except TreecastError as error:
        return error
    except Exception as error:
        log.error("walk.failed", request_id=request.start.request_id, exc_info=error)
        return TreecastError("internal error")
