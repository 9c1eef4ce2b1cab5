"""The verifier's clock: collect, plan, forward, walk, commit.

Everything but the forward pass and the picks runs on the event loop; those two run on the
engine's own thread. Only this loop touches the KV pool, and only between forwards.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import structlog

from treecast.engine.base import Engine, LogitRows
from treecast.engine.curve import StepCurve
from treecast.errors import DeadlineExceeded, EngineLost, HandedOver, Overloaded, TreecastError
from treecast.sampling.laws import Walk, walk
from treecast.sampling.stops import FinishReason, Stop
from treecast.telemetry.traces import Tracing
from treecast.wire.frames import Completed, Cost, Failed, Heartbeat, Progress, SessionKey
from treecast.wire.link import SILENCE_S
from treecast.wire.rounds import MAX_ROUNDS, Round

from .attachments import PROBE_EVERY
from .metrics import VerifierMetrics
from .pace import Goodput, worth_waiting
from .plan import Work, plan
from .requests import Request
from .rounds import StepTimes, round_of
from .sessions import SessionStore
from .settings import VerifierSettings
from .spans import RequestSpans
from .speculation import Speculation

HANDED_OVER = "the verifier is draining and has handed the request over"

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
        speculation: Speculation,
        curve: StepCurve,
        metrics: VerifierMetrics,
        tracing: Tracing,
    ) -> None:
        self._engine = engine
        self._thread = thread
        self._settings = settings
        self._speculation = speculation
        self._metrics = metrics
        self._spans = RequestSpans(tracing)
        self.curve = curve
        self._goodput = Goodput(1 / curve(1))
        self._times = StepTimes()
        self.sessions = SessionStore(engine, settings.session_ttl_s, metrics.evicted)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._forgotten: list[SessionKey] = []
        self._blocked = False
        self._wake = asyncio.Event()
        self._rest = asyncio.Event()
        self._steps = 0
        self._step_began: float | None = None
        self._predicted_s = 0.0
        speculation.on_tree = self._wake.set
        self._show()

    # --- from the event loop, at any time -------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request for the next step.

        Raises:
            Overloaded: too many are waiting, or the pool is too small for it.
            StaleLease: the session has moved on.
        """
        needed = self._capacity(request)
        usage = self._engine.usage
        if needed > usage.total * usage.page_tokens:
            raise Overloaded(
                f"the request needs room for {needed} positions; the KV pool has "
                f"{usage.total * usage.page_tokens}"
            )
        running, waiting = len(self._running), len(self._waiting)
        slots, places = self._settings.max_running, self._settings.max_waiting
        if running + waiting >= slots + places:
            raise Overloaded(
                f"{running} requests are running and {waiting} waiting; the limits are {slots} "
                f"and {places}"
            )
        if request.start.session is not None:
            self.sessions.check_epoch(request.start.session)
        self._waiting.append(request)
        self._blocked = False
        self._rest.clear()
        self._wake.set()

    def cancel(self, request: Request) -> None:
        """End a request at the next step boundary; its pages are free then."""
        request.cancelled = True
        self._wake.set()

    def forget(self, session: SessionKey) -> None:
        """Free what a session retains."""
        self._forgotten.append(session)
        self._wake.set()

    def hand_over(self) -> None:
        """End all requests at the next step boundary, for their routers to place elsewhere."""
        for request in (*self._running, *self._waiting):
            request.handed_over = True
        self._wake.set()

    @property
    def num_requests(self) -> int:
        """Running and waiting."""
        return len(self._running) + len(self._waiting)

    async def finished(self) -> None:
        """Wait until no request is left."""
        await self._rest.wait()

    @property
    def _idle(self) -> bool:
        return not self._running and not self._waiting

    def heartbeat(self, draining: bool) -> Heartbeat:
        """How the loop fares, for peers."""
        usage = self._engine.usage
        began = self._step_began
        return Heartbeat(
            steps=self._steps,
            step_age_ms=0 if began is None else int(1000 * (time.monotonic() - began)),
            step_predicted_ms=int(1000 * self._predicted_s),
            free_capacity=0 if draining else self._free_slots(),
            running=len(self._running),
            waiting=len(self._waiting),
            kv_pages_free=usage.free,
            kv_pages_total=usage.total,
            draining=draining,
        )

    def _free_slots(self) -> int:
        return max(0, self._settings.max_running - len(self._running) - len(self._waiting))

    # --- the loop -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Step for ever; cancel the task to stop, at a step boundary.

        Raises:
            EngineLost: the engine can do nothing any more.
        """
        while True:
            with self._timed("collect"):
                await self._collect()
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
                self._fail(batch, error)
                continue
            with self._timed("commit"):
                self._commit(batch, walks)

    async def _collect(self) -> None:
        """Wait for work, then for trees while they are worth it."""
        self._wake.clear()
        while self._idle and not self._forgotten:
            self._rest.set()
            try:
                await asyncio.wait_for(self._wake.wait(), timeout=1.0)
            except TimeoutError:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.check)
            self._wake.clear()
            self.sessions.expire()
            self._times.began = time.monotonic()
        await asyncio.sleep(0)  # let frames that have arrived be handled
        await self._wait_for_trees()

    async def _wait_for_trees(self) -> None:
        """Trees of a running batch are waited for while they are worth it, but no newcomer is
        made to wait for them.
        """
        if not self._speculation.owed(self._running):
            return
        with self._metrics.draft_wait.time():
            await self._wait_while_worth()

    async def _wait_while_worth(self) -> None:
        began = time.monotonic()
        patience_s = cap_s = self._longest_wait_s()
        while not self._may_admit and self._worth_waiting(cap_s, cap_s - patience_s):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), timeout=patience_s)
            self._wake.clear()
            patience_s = cap_s - (time.monotonic() - began)
            if patience_s <= 0:
                self._speculation.waited_in_vain(self._running, cap_s)
                return

    @property
    def _may_admit(self) -> bool:
        """Whether somebody waits who may find room, or a sibling's prompt, at the next step."""
        return bool(self._waiting) and not self._blocked

    def _longest_wait_s(self) -> float:
        return SILENCE_S if self._settings.planner == "full" else self.curve(len(self._running))

    def _worth_waiting(self, cap_s: float, waited_s: float) -> bool:
        """Whether the trees owed are expected to add more tokens than the wait costs.

        Now and then it waits anyway, so that what trees are worth stays known. Those that are made
        on our own cores were asked for because they pay, and a step beside them is a slow one.
        """
        owed = self._speculation.owed(self._running)
        if not owed or any(request.cancelled for request in self._running):
            return False
        if self._settings.planner == "full" or any(item.shares_cores for item in owed):
            return True
        gain = sum(item.gain_tokens for item in owed)
        left_s = max(item.latency_s for item in owed) - waited_s
        probing = self._steps % PROBE_EVERY == 0
        rate = self._price * len(self._running)
        return probing or worth_waiting(gain, rate, left_s, cap_s - waited_s)

    @property
    def _price(self) -> float:
        """Tokens that a second is worth to each request; the planner `full` takes its time."""
        return 0.0 if self._settings.planner == "full" else self._goodput.tokens_per_s

    def _plan(self) -> list[Work]:
        """Admit, drop what has ended, and divide the step's rows."""
        self._reap()
        for session in self._forgotten:
            self.sessions.forget(session)
        self._forgotten.clear()
        self.sessions.expire()
        self._admit()
        self._speculation.rearrange()
        trees = [self._speculation.tree(request) for request in self._running]
        price = self._price * len(self._running)
        batch = plan(self._running, trees, self.curve, self._settings.max_rows, price)
        self._metrics.planned(sum(map(len, trees)), (work.tree for work in batch))
        return batch

    def _reap(self) -> None:
        for request in [r for r in self._running if r.cancelled or r.expired]:
            cut = FinishReason.CANCELLED if request.cancelled else FinishReason.DEADLINE
            self._finish(request, Stop(cut))
        for request in [r for r in self._running if r.handed_over]:
            self._retire(request)
            self._refuse(request, HandedOver(HANDED_OVER))
        for request in [r for r in self._waiting if r.handed_over]:
            self._waiting.remove(request)
            self._refuse(request, HandedOver(HANDED_OVER))
        for request in [r for r in self._waiting if r.cancelled or r.expired]:
            self._waiting.remove(request)
            if request.cancelled:
                self._complete(request, Stop(FinishReason.CANCELLED))
            else:
                self._refuse(request, self._too_late(request))

    def _too_late(self, request: Request) -> DeadlineExceeded:
        usage = self._engine.usage
        return DeadlineExceeded(
            f"deadline of {request.start.deadline_ms} ms passed while the request waited for room; "
            f"{len(self._running)} of {self._settings.max_running} requests are running, "
            f"{usage.free} of {usage.total} KV pages are free"
        )

    def _admit(self) -> None:
        """Take waiting requests in, oldest first; one that waits for a sibling holds nobody up."""
        self._blocked = True
        for request in list(self._waiting):
            if len(self._running) >= self._settings.max_running:
                return
            try:
                if not self.sessions.open(request, self._running, self._capacity(request)):
                    continue
            except Overloaded:
                return  # pages will come free
            self._waiting.remove(request)
            self._running.append(request)
            self._speculation.admit(request)
            request.admitted_at = time.monotonic()
            self._metrics.wait.observe(request.admitted_at - request.arrived_at)
            self._spans.admitted(request)

    def _capacity(self, request: Request) -> int:
        return len(request.tokens) + request.tokens_left + self._settings.max_nodes + 1

    async def _forward(self, batch: Sequence[Work]) -> list[LogitRows]:
        """One packed pass on the engine's thread."""
        rows = sum(work.num_rows for work in batch)
        segments = [work.segment() for work in batch]
        self._metrics.batch_size.observe(len(batch))
        self._metrics.batch_rows.observe(rows)
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
                self._abandon(request, walked)
                continue
            assert request.sequence is not None
            accepted = () if walked is None else walked.accepted
            self._engine.commit(request.sequence, work.path(accepted))
            self._metrics.prefill_tokens.inc(work.num_pending - (walked is not None))
            if walked is not None:
                self._emit(work, walked)
        self._times.began = self._times.ended

    def _measure(self, batch: Sequence[Work], walks: Sequence[Walk | TreecastError | None]) -> None:
        """How much came out since the last step; those with prompts in them say nothing."""
        self._times.ended = time.monotonic()
        took_s = self._times.ended - self._times.began
        counts = [len(walked.tokens) for walked in walks if isinstance(walked, Walk)]
        if counts and all(work.num_pending == 1 for work in batch):
            self._goodput.saw(sum(counts), len(counts), took_s)
        self._speculation.tokens_per_s = self._price
        self._metrics.goodput.set(self._price)

    def _emit(self, work: Work, walked: Walk) -> None:
        request = work.request
        begin = request.num_output
        request.tokens.extend(walked.tokens)
        self._account(work, walked)
        self._spans.stepped(work, walked, self._times)
        rounds = self._report(work, walked, begin) if request.start.report_rounds else ()
        proposers = [work.tree.proposers[node] for node in walked.accepted]
        self._speculation.committed(request, walked.tokens, proposers)
        cost = Cost(1, len(work.tree), len(walked.accepted))
        tokens, logprobs = tuple(walked.tokens), tuple(walked.logprobs)
        request.link.send(Progress(request.start.handle, begin, tokens, logprobs, cost, rounds))
        if walked.stop is not None:
            self._finish(request, walked.stop)

    def _report(self, work: Work, walked: Walk, begin: int) -> tuple[Round, ...]:
        """The step as the request's round; none once there were enough of them."""
        if work.request.tally.steps > MAX_ROUNDS:
            return ()
        return (round_of(work, walked, begin, self._times),)

    def _account(self, work: Work, walked: Walk) -> None:
        request, count = work.request, len(walked.tokens)
        request.tally.add(work.tree, len(walked.accepted))
        accepted = Counter(work.tree.proposers[node] for node in walked.accepted)
        for bits, verified in Counter(work.tree.proposers).items():
            names = self._speculation.proposers(request, bits)
            self._metrics.proposed(names, verified, accepted[bits])
        depth = max(work.tree.depths, default=0)
        self._metrics.tree_verified(len(work.tree), depth, len(walked.accepted))
        self._metrics.tokens.inc(count)
        self._metrics.step_tokens.observe(count)
        now = time.monotonic()
        if request.last_commit_at is None:
            self._blocked = False  # siblings may have waited for its prompt
            self._metrics.first_token.observe(now - request.arrived_at)
            self._spans.prefilled(request, now)
        else:
            self._metrics.inter_token.observe((now - request.last_commit_at) / count)
        request.last_commit_at = now

    # --- ends -----------------------------------------------------------------------------------

    def _finish(self, request: Request, stop: Stop) -> None:
        self._retire(request)
        self._complete(request, stop)

    def _retire(self, request: Request) -> None:
        """Take it out of the batch; its session keeps what was computed."""
        self._running.remove(request)
        self._speculation.release(request)
        self.sessions.close(request, self._running)

    def _complete(self, request: Request, stop: Stop) -> None:
        self._metrics.requests.labels(stop.reason.name.lower()).inc()
        self._spans.ended(request, stop.reason.name.lower())
        request.link.send(
            Completed(request.start.handle, stop.reason, request.usage(), stop.characters)
        )
        request.on_end()

    def _refuse(self, request: Request, error: TreecastError) -> None:
        self._metrics.requests.labels(error.reason.lower()).inc()
        self._spans.ended(request, error.reason.lower(), error.reason.lower())
        request.link.send(Failed(request.start.handle, error))
        request.on_end()

    def _fail(self, batch: Sequence[Work], error: Exception) -> None:
        """The forward broke: the requests in it end with an error, everyone else goes on."""
        log.error("step.failed", exc_info=error, requests=len(batch))
        for work in batch:
            self._abandon(work.request, TreecastError("the step failed; see the verifier's log"))

    def _abandon(self, request: Request, error: TreecastError) -> None:
        """End a running request with an error; its KV is not to be trusted."""
        self._running.remove(request)
        self._speculation.release(request)
        self.sessions.discard(request)
        self._refuse(request, error)

    def _show(self) -> None:
        """Gauges are read when they are asked for: between two requests nothing would set them."""
        metrics, engine = self._metrics, self._engine
        metrics.pages.labels("free").set_function(lambda: engine.usage.free)
        metrics.pages.labels("used").set_function(lambda: engine.usage.used)
        metrics.running.set_function(lambda: len(self._running))
        metrics.waiting.set_function(lambda: len(self._waiting))
        metrics.retained.set_function(lambda: len(self.sessions))

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        with self._metrics.phase.labels(phase).time():
            yield

    def close(self) -> None:
        """Stop the engine's thread once its work is done. Blocks."""
        self._thread.shutdown(wait=True)


def _walk_one(work: Work, rows: LogitRows) -> Walk | TreecastError | None:
    """One request's walk; a row that the model broke down on is that request's error alone."""
    if not work.samples:
        return None
    try:
        request = work.request
        return walk(work.tree, rows, request.picker, request.stops.check, request.law)
    except TreecastError as error:
        return error
