"""What routers ask, turned into requests of the step loop."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import structlog

from treecast.engine.base import Engine, check_adapter
from treecast.errors import InvalidRequest, PromptTooLong, TreecastError
from treecast.sampling.compiler import GrammarCompiler
from treecast.sampling.grammar import Matcher
from treecast.sampling.laws import acceptance_rule
from treecast.sampling.params import Law
from treecast.sampling.pick import Picker
from treecast.sampling.stops import Stop, StopRules
from treecast.sampling.transforms import Context
from treecast.telemetry.traces import Tracing
from treecast.text.detok import INLINE_TOKENS, Decode
from treecast.wire.frames import (
    BadFrame,
    Cancel,
    Completed,
    Failed,
    FinishReason,
    Forget,
    Heartbeat,
    RouterFrame,
    ServingFrame,
    SessionKey,
    Start,
)
from treecast.wire.link import Link

from .requests import Request
from .step import StepLoop

log = structlog.get_logger()

RouterLink = Link[ServingFrame, RouterFrame]


@dataclass(slots=True)
class _Preparing:
    """A request that is not ready yet: its grammar is compiled, its earlier output read."""

    start: Start
    task: asyncio.Task[None]
    retain: bool = True


class Admission:
    """Turns what routers ask into requests of the step loop. A `PairHandler` for their streams."""

    def __init__(
        self,
        engine: Engine,
        steps: StepLoop,
        decode: Decode | None,
        check_law: Callable[[Law], None],
        tracing: Tracing,
        grammars: GrammarCompiler,
    ) -> None:
        self._engine = engine
        self._steps = steps
        self._decode = decode
        self._check_law = check_law
        self._tracing = tracing
        self._grammars = grammars
        self._handles = itertools.count(1)
        self._requests: dict[RouterLink, dict[int, Request]] = {}
        self._preparing: dict[tuple[RouterLink, int], _Preparing] = {}

    @property
    def num_requests(self) -> int:
        """Those of the step loop, and those that are being prepared."""
        return self._steps.num_requests + self.num_preparing

    @property
    def num_preparing(self) -> int:
        """Those whose grammar is compiled or whose earlier output is followed."""
        return len(self._preparing)

    async def finished(self) -> None:
        """Wait until no request is left."""
        await self._steps.finished()
        while self._preparing:
            await asyncio.wait([each.task for each in self._preparing.values()])
            await self._steps.finished()

    def opened(self, link: RouterLink) -> None:
        self._requests[link] = {}

    def closed(self, link: RouterLink) -> None:
        """The router is gone: it re-places its requests elsewhere, so they end here."""
        for handle in [handle for at, handle in self._preparing if at is link]:
            self._preparing[link, handle].task.cancel()
        for request in self._requests.pop(link, {}).values():
            self._steps.cancel(request)

    def beat(self, link: RouterLink, heartbeat: Heartbeat) -> None:
        """Liveness is the stream's concern; nothing to do."""

    def failed_frame(self, link: RouterLink, error: BadFrame) -> None:
        """A malformed request ends with its fault; one already running is cancelled."""
        self._cancel(link, error.handle)
        link.send(Failed(error.handle, error.cause))

    def received(self, link: RouterLink, frame: RouterFrame) -> None:
        match frame:
            case Start():
                self._start(link, frame)
            case Cancel():
                self._cancel(link, frame.handle)
            case Forget():
                self._forget(frame.session)

    def _forget(self, session: SessionKey) -> None:
        """Free what the session retains now, and what its requests would leave behind."""
        for requests in self._requests.values():
            for request in requests.values():
                request.retain &= not request.belongs_to(session)
        for preparing in self._preparing.values():
            preparing.retain &= not preparing.start.belongs_to(session)
        self._steps.forget(session)

    def _cancel(self, link: RouterLink, handle: int) -> None:
        request, preparing = self._requests[link].get(handle), self._preparing.get((link, handle))
        if request is not None:
            self._steps.cancel(request)
        elif preparing is not None and preparing.task.cancel():
            link.send(Completed(handle, FinishReason.CANCELLED))

    def _start(self, link: RouterLink, start: Start) -> None:
        at = (link, start.handle)
        if start.handle in self._requests[link] or at in self._preparing:
            raise InvalidRequest(f"handle {start.handle} is in use on this stream")
        arrived_at = time.monotonic()
        if not start.sampling.constraint[0] and len(start.committed) <= INLINE_TOKENS:
            self._submit(link, start, arrived_at)
            return
        try:
            self._steps.check_places(len(self._preparing))
        except TreecastError as error:
            _refuse(link, start, error)
            return
        task = asyncio.create_task(self._prepare(link, start, arrived_at))
        self._preparing[at] = _Preparing(start, task)
        task.add_done_callback(lambda _: self._preparing.pop(at, None))

    def _submit(self, link: RouterLink, start: Start, arrived_at: float) -> None:
        try:
            self._begin(*self._taken_up(link, start, arrived_at, None))
        except TreecastError as error:
            _refuse(link, start, error)

    async def _prepare(self, link: RouterLink, start: Start, arrived_at: float) -> None:
        """Other requests go on meanwhile; its deadline does too."""
        try:
            grammar = await self._grammars.matcher(start.sampling)
            taking = partial(self._taken_up, link, start, arrived_at, grammar)
            request, stop = await asyncio.to_thread(taking)
            request.retain = self._preparing.pop((link, start.handle)).retain
            self._begin(request, stop)
        except TreecastError as error:
            _refuse(link, start, error)
        except Exception as error:
            log.error("request.not_prepared", request_id=start.request_id, exc_info=error)
            _refuse(link, start, TreecastError("internal error"))

    def _begin(self, request: Request, stop: Stop | None) -> None:
        """Raises TreecastError: the step loop has no place for it."""
        link, start = request.link, request.start
        if stop is not None:  # the stream was lost between its last token and its end
            link.send(Completed(start.handle, stop.reason, request.usage(), stop.characters))
            return
        self._steps.submit(request)
        request.span = self._tracing.begin("treecast.serve", start.traceparent)
        mine = self._requests[link]
        mine[start.handle] = request
        request.on_end = lambda: _ended(mine, request)

    def _taken_up(
        self, link: RouterLink, start: Start, arrived_at: float, grammar: Matcher | None
    ) -> tuple[Request, Stop | None]:
        """A request that stands behind its earlier output, and whether that was complete.

        On any thread: much output takes long to be read, by a grammar above all.
        """
        request = self._request(link, start, arrived_at, grammar)
        return request, _first_stop(request.stops, start.committed)

    def _request(
        self, link: RouterLink, start: Start, arrived_at: float, grammar: Matcher | None
    ) -> Request:
        info, sampling = self._engine.info, start.sampling
        self._check_law(start.speculation.law)
        check_adapter(info, start.adapter)
        sampling.check_vocabulary(info.vocab_size)
        prompt = fit_prompt(start, info.context_tokens, info.vocab_size)
        deadline = None
        if start.deadline_ms is not None:
            deadline = arrived_at + start.deadline_ms / 1000
        return Request(
            handle=next(self._handles),
            start=start,
            link=link,
            tokens=[*prompt, *start.committed],
            prompt_len=len(prompt),
            law=acceptance_rule(start.speculation.law),
            picker=Picker(sampling, start.noise_key, Context(prompt, start.committed, grammar)),
            stops=StopRules(info.eos_token_ids, sampling, self._decode),
            deadline=deadline,
            arrived_at=arrived_at,
        )


def _refuse(link: RouterLink, start: Start, error: TreecastError) -> None:
    log.info("request.refused", request_id=start.request_id, why=error.message)
    link.send(Failed(start.handle, error))


def _ended(requests: dict[int, Request], request: Request) -> None:
    requests.pop(request.start.handle, None)
    usage = request.usage()
    log.info(
        "request.ended",
        request_id=request.start.request_id,
        num_tokens=usage.output_tokens,
        steps=usage.steps,
    )


def _first_stop(stops: StopRules, committed: Sequence[int]) -> Stop | None:
    """Take in output that an earlier placement committed; tells if it was complete."""
    for token in committed:
        if stop := stops.check(token):
            return stop
    return None


def fit_prompt(start: Start, context_tokens: int, vocab_size: int) -> list[int]:
    """The prompt as it will be computed.

    Raises:
        InvalidRequest: empty, or an unknown token id.
        PromptTooLong: prompt and output do not fit, and truncation was not asked for.
    """
    if not start.prompt:
        raise InvalidRequest("prompt is empty")
    for token in (*start.prompt, *start.committed):
        if not 0 <= token < vocab_size:
            raise InvalidRequest(f"token id {token} is unknown; the vocabulary has {vocab_size}")
    room = context_tokens - start.sampling.max_tokens
    if len(start.prompt) <= room:
        return list(start.prompt)
    if start.truncate_prompt and room > 0:
        return list(start.prompt[-room:])
    raise PromptTooLong(
        f"prompt has {len(start.prompt)} tokens and max_tokens is {start.sampling.max_tokens}; "
        f"the limit is {context_tokens} together"
    )
