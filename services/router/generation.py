"""One accepted request from placement to its end, through the loss of verifiers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from treecast.adapter import Adapter, prefix_salt
from treecast.errors import HandedOver, StaleLease, TreecastError, Unavailable
from treecast.sampling.noise import noise_key
from treecast.telemetry.traces import UNTRACED, Attributes, Span, Tracing
from treecast.text.detok import INLINE_TOKENS, DetokStream
from treecast.wire.frames import Completed, Failed, FinishReason, Hello, SessionKey, Start

from . import messages
from .dispatch import Dispatcher
from .lengths import OWN_ENDS, Expected, LengthPredictor
from .messages import Ask
from .metrics import Caller, RouterMetrics
from .placement import Wanted
from .prefixes import Prefixes
from .queue import Share
from .relay import Relay
from .seat import Lost, Seat
from .sessions import Session
from .turnstile import Turnstile
from .writer import Writer

MAX_STALE_LEASES = 3

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Job:
    """A request that has been checked, and all that serving it needs.

    Attributes:
        share: its turn in the queue, and what it may cost.
        expected: how long each output may be; None for no idea.
        caller: whom it is counted for.
        model: hello of one of the verifiers that serve it.
        adapter: that it is computed with; None for the model alone.
        deadline_s: time of the event loop; None for none.
    """

    ask: Ask
    share: Share
    expected: Expected | None
    caller: Caller
    prompt: tuple[int, ...]
    model: Hello
    adapter: Adapter | None
    session: Session
    deadline_s: float | None
    arrived_s: float
    detokenizer: Callable[[], DetokStream]
    token_text: Callable[[int], str]
    writer: Writer
    span: Span = UNTRACED

    @property
    def adapter_name(self) -> str:
        return self.adapter.name if self.adapter else ""

    @property
    def prefix_salt(self) -> str:
        """Of the prompt's beginnings: whose they are, and what computes them."""
        return prefix_salt(self.share.tenant, self.adapter_name)


@dataclass(slots=True)
class Sample:
    """One of a request's outputs.

    Attributes:
        fingerprint: numerics that the text began with.
        num_moves: how often it was placed anew, verifiers lost and those that handed it over.
    """

    index: int
    relay: Relay
    fingerprint: str
    same_numerics: bool = True
    num_lost: int = 0
    num_moves: int = 0
    num_stale: int = 0
    avoid: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Placed:
    seats: list[Seat]
    key: SessionKey | None


class Generation:
    """Serves one job. Everything it takes is given back when `run` ends, however it ends."""

    def __init__(
        self,
        job: Job,
        dispatcher: Dispatcher,
        prefixes: Prefixes,
        lengths: LengthPredictor,
        turnstile: Turnstile,
        max_placements: int,
        metrics: RouterMetrics,
        tracing: Tracing,
    ) -> None:
        self._tracing = tracing
        self._job = job
        self._dispatcher = dispatcher
        self._prefixes = prefixes
        self._lengths = lengths
        self._turnstile = turnstile
        self._max_placements = max_placements
        self._metrics = metrics
        self._seats: list[Seat] = []

    @property
    def spent(self) -> int:
        """Tokens of the prompt and the output so far; 0 before it is placed."""
        if not self._seats:
            return 0
        job = self._job
        return len(job.prompt) + len(job.ask.committed) + job.writer.num_tokens

    async def run(self) -> FinishReason:
        """Serve all samples; returns why the first one ended.

        Raises:
            TreecastError: what ended the request; samples still running are cancelled.
        """
        job = self._job
        texts = [await self._text() for _ in range(job.ask.num_samples)]
        try:
            placed = await self._place(self._admit, job.ask.num_samples, job.ask.fingerprint)
            return await self._serve_all(placed, texts)
        finally:
            for seat in self._seats:
                seat.leave()
            if self._seats:
                self._dispatcher.settle(job.share, self.spent)
            await job.session.end()

    async def _text(self) -> DetokStream:
        """A sample's text, with what the client has of it; on a thread where that is much."""
        committed, text = self._job.ask.committed, self._job.detokenizer()
        if len(committed) > INLINE_TOKENS:
            await asyncio.to_thread(text.push, committed)
        else:
            text.push(committed)
        return text

    async def _serve_all(self, placed: Placed, texts: Sequence[DetokStream]) -> FinishReason:
        samples = [
            self._sample(index, text, seat)
            for index, (text, seat) in enumerate(zip(texts, placed.seats, strict=True))
        ]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._serve(sample, seat, placed.key))
                    for sample, seat in zip(samples, placed.seats, strict=True)
                ]
                group.create_task(self._note_prefix(placed.seats[0].verifier.instance_id))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return tasks[0].result()

    def _sample(self, index: int, text: DetokStream, seat: Seat) -> Sample:
        job, loop = self._job, asyncio.get_running_loop()
        relay = Relay(
            index,
            job.ask.committed,
            text,
            job.token_text,
            job.writer.write,
            self._metrics,
            job.caller,
            loop.time,
            job.arrived_s,
        )
        return Sample(index, relay, job.ask.fingerprint or seat.verifier.fingerprint)

    async def _serve(self, sample: Sample, seat: Seat, key: SessionKey | None) -> FinishReason:
        """Relay one sample, placing it anew until one verifier sees it through."""
        job = self._job
        seat.start(self._start(sample, seat, key))
        first = messages.started(sample.index, job.ask, job.prompt, seat.verifier, job.adapter)
        await job.writer.write(first)
        while True:
            sample.same_numerics &= seat.verifier.fingerprint == sample.fingerprint
            end = await sample.relay.follow(seat)
            if isinstance(end, Completed):
                placements = sample.num_moves + 1
                self._learn_length(len(sample.relay.output.tokens), end.finish)
                await sample.relay.finish(end, placements, sample.same_numerics)
                if sample.index == 0:
                    job.span.note(_facts(job, end, placements))
                return end.finish
            await self._turnstile.enter()  # a verifier that is lost may have had hundreds
            self._bear(sample, seat, end)
            placed = await self._place(self._readmit, 1, sample.fingerprint, sample.avoid)
            seat, key = placed.seats[0], placed.key
            seat.start(self._start(sample, seat, key))

    def _start(self, sample: Sample, seat: Seat, key: SessionKey | None) -> Start:
        job, ask = self._job, self._job.ask
        left_ms: int | None = None
        if job.deadline_s is not None:
            left_s = job.deadline_s - asyncio.get_running_loop().time()
            left_ms = min(2**32 - 1, max(1, round(left_s * 1000)))
        return Start(
            handle=seat.handle,
            request_id=ask.request_id,
            prompt=job.prompt,
            sampling=ask.sampling,
            noise_key=noise_key(ask.seed, sample.index),
            committed=tuple(sample.relay.output.tokens),
            session=key,
            speculation=ask.speculation,
            deadline_ms=left_ms,
            truncate_prompt=ask.truncate_prompt,
            tenant=job.share.tenant,
            report_rounds=ask.report_rounds,
            traceparent=job.span.traceparent,
            expected_tokens=self._expected_tokens(sample),
            priority=ask.priority,
            adapter=job.adapter_name,
        )

    def _expected_tokens(self, sample: Sample) -> int | None:
        expected = self._job.expected
        return expected.after(len(sample.relay.output.tokens)) if expected else None

    def _learn_length(self, num_tokens: int, finish: FinishReason) -> None:
        job, expected = self._job, self._job.expected
        whose = (job.caller.tenant, job.caller.model, job.adapter_name)
        self._lengths.learn(whose, expected, num_tokens, finish)
        if expected is not None and finish in OWN_ENDS:
            error = self._metrics.length_error.labels(expected.source.value)
            error.observe(expected.doublings(num_tokens))

    def _bear(self, sample: Sample, seat: Seat, end: Failed | Lost) -> None:
        """Note why a placement ended early.

        Raises:
            TreecastError: another placement cannot help, or there have been too many.
        """
        error = Unavailable(f"verifier was lost: {end.why}") if isinstance(end, Lost) else end.error
        if isinstance(error, StaleLease):
            self._bear_stale_lease(sample, error)
        elif isinstance(error, Unavailable):
            self._bear_loss(sample, seat, end)
        else:
            raise error
        log.info(
            "request.placed_anew",
            request_id=self._job.ask.request_id,
            verifier=seat.verifier.instance_id,
            num_tokens=len(sample.relay.output.tokens),
            why=error.message,
        )

    def _bear_stale_lease(self, sample: Sample, error: TreecastError) -> None:
        sample.num_stale += 1
        if sample.num_stale > MAX_STALE_LEASES:
            raise error
        self._job.session.doubt()
        self._metrics.replacements.labels("stale_lease").inc()

    def _bear_loss(self, sample: Sample, seat: Seat, end: Failed | Lost) -> None:
        """A request that brings its verifiers down must not go through all of them."""
        handed_over = isinstance(end, Failed) and isinstance(end.error, HandedOver)
        sample.num_moves += 1
        sample.num_lost += not handed_over
        if sample.num_lost >= self._max_placements:
            raise Unavailable(
                f"request lost {sample.num_lost} verifiers; the limit is {self._max_placements}"
            )
        sample.avoid |= {seat.stream}
        self._metrics.replacements.labels("handed_over" if handed_over else "lost").inc()

    # --- placement ----------------------------------------------------------------------------

    async def _place(
        self,
        admit: Callable[[Wanted], Awaitable[list[Seat]]],
        slots: int,
        fingerprint: str,
        avoid: frozenset[int] = frozenset(),
    ) -> Placed:
        """Seats on one verifier that holds, or from now on holds, the session."""
        while True:
            where = await self._job.session.look()
            wanted = Wanted(
                model=self._job.model.model,
                revision=self._job.model.model_revision,
                spread=self._job.ask.request_id,
                law=self._job.ask.speculation.law,
                adapter=self._job.adapter,
                grammar=bool(self._job.ask.sampling.constraint[0]),
                slots=slots,
                holder=where.holder,
                prefix_holders=await self._near(where.holder),
                rendezvous=where.rendezvous,
                fingerprint=fingerprint,
                avoid=avoid,
            )
            seats = await self._wait(admit(wanted))
            self._seats += seats
            taken = await self._job.session.take(seats[0].verifier.instance_id, where)
            if taken is not None:
                return Placed(seats, taken.key)
            _leave(seats)
            admit = self._readmit

    async def _near(self, holder: str) -> tuple[str, ...]:
        """Who has the prompt's beginning; not asked where the session's holder is known."""
        job = self._job
        return () if holder else await self._prefixes.find(job.prefix_salt, job.prompt)

    async def _note_prefix(self, holder: str) -> None:
        await self._prefixes.note(self._job.prefix_salt, self._job.prompt, holder)

    async def _wait(self, turn: Awaitable[list[Seat]]) -> list[Seat]:
        """Wait in the queue, and tell for how long."""
        caller, joined_s = self._job.caller, time.monotonic()
        seats = await turn
        seated_s = time.monotonic()
        labels = (caller.tenant, caller.model, str(self._job.ask.priority))
        self._metrics.queue_wait.labels(*labels).observe(seated_s - joined_s)
        if self._tracing.on:
            verifier = {"treecast.verifier": seats[0].verifier.instance_id}
            context = self._job.span.traceparent
            self._tracing.record("treecast.queue", context, joined_s, seated_s, verifier)
        return seats

    async def _admit(self, wanted: Wanted) -> list[Seat]:
        return await self._dispatcher.admit(wanted, self._job.share, self._job.deadline_s)

    async def _readmit(self, wanted: Wanted) -> list[Seat]:
        return await self._dispatcher.readmit(wanted, self._job.deadline_s)


def _facts(job: Job, end: Completed, placements: int) -> Attributes:
    """What a request's span says of it."""
    return {
        "gen_ai.request.model": job.model.model,
        "gen_ai.usage.input_tokens": end.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": end.usage.output_tokens,
        "treecast.request_id": job.ask.request_id,
        "treecast.num_samples": job.ask.num_samples,
        "treecast.placements": placements,
    }


def _leave(seats: Sequence[Seat]) -> None:
    for seat in seats:
        seat.leave()
