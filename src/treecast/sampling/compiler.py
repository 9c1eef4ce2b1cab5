"""Compiling constraints beside the event loop: a large schema takes a good part of a second."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from treecast.errors import InvalidRequest, Overloaded, TreecastError
from treecast.sampling.grammar import Grammars, Matcher, require_grammars
from treecast.sampling.params import SamplingParams

MOST_KEPT = 64
COMPILE_S = 10.0

Key = tuple[str, str]


class _Job:
    """A grammar in the line, being compiled, or compiled."""

    def __init__(self, work: Future[Matcher]) -> None:
        self.work = work
        self.made = asyncio.wrap_future(work)
        self.num_waiting = 0

    @property
    def begun(self) -> bool:
        return self.work.running() or self.work.done()


class GrammarCompiler:
    """Makes matchers on a thread of its own, which llguidance lets go on by itself, and keeps the
    latest: a service's requests often share a schema. Event loop only.
    """

    def __init__(
        self, grammars: Grammars | None, limit_s: float = COMPILE_S, most_kept: int = MOST_KEPT
    ) -> None:
        """Prepare; nothing is compiled yet.

        Args:
            grammars: of the tokenizer; None where constraints cannot be kept.
            limit_s: how long a request waits for its grammar, those before it in the line included.
            most_kept: compiled grammars; the one used longest ago goes first.
        """
        self._grammars = grammars
        self._limit_s = limit_s
        self._most_kept = most_kept
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._kept: OrderedDict[Key, _Job] = OrderedDict()

    @property
    def keeps_grammars(self) -> bool:
        """Whether a constraint can be kept at all."""
        return self._grammars is not None

    def close(self) -> None:
        """Drop what waits; does not wait for what is being compiled."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def ready(self, sampling: SamplingParams) -> Matcher | None:
        """A matcher at the beginning of the output, if the grammar has been compiled before."""
        job = self._kept.get(sampling.constraint)
        if job is None or not job.made.done() or job.made.cancelled() or job.made.exception():
            return None
        self._kept.move_to_end(sampling.constraint)
        return job.made.result().copy()

    async def matcher(self, sampling: SamplingParams) -> Matcher | None:
        """The request's matcher; None for one that asks for no constraint.

        Raises:
            InvalidRequest: the constraint is malformed, too complex, or not compiled in time; or
                nothing here can keep it.
            Overloaded: those before it in the line took all the time.
        """
        if not sampling.constraint[0]:
            return None
        job = self._job(sampling)
        job.num_waiting += 1
        try:
            async with asyncio.timeout(self._limit_s):
                # Others may wait for the same grammar, so nobody's leaving ends its compiling.
                return (await asyncio.shield(job.made)).copy()
        except TimeoutError:
            raise self._too_late(job, sampling) from None
        finally:
            self._leave(job, sampling.constraint)

    def _job(self, sampling: SamplingParams) -> _Job:
        key, grammars = sampling.constraint, require_grammars(self._grammars, sampling)
        if key not in self._kept:
            job = _Job(self._thread.submit(grammars.matcher, sampling))
            job.made.add_done_callback(lambda _: self._drop_failed(key, job))
            self._kept[key] = job
            while len(self._kept) > self._most_kept:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _leave(self, job: _Job, key: Key) -> None:
        """What nobody waits for any more is not begun."""
        job.num_waiting -= 1
        if not job.num_waiting and job.work.cancel():
            self._drop(key, job)

    def _too_late(self, job: _Job, sampling: SamplingParams) -> TreecastError:
        kind, text = sampling.constraint
        what, limit = f"{kind} of {len(text)} characters", f"in {self._limit_s:g} s"
        if job.begun:
            return InvalidRequest(f"{what} was not compiled {limit}")
        return Overloaded(f"{what} had no turn to be compiled {limit}")

    def _drop_failed(self, key: Key, job: _Job) -> None:
        if job.made.cancelled() or job.made.exception():
            self._drop(key, job)

    def _drop(self, key: Key, job: _Job) -> None:
        if self._kept.get(key) is job:
            del self._kept[key]
