"""Compiling constraints beside the event loop: a large schema takes a good part of a second."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from treecast.errors import InvalidRequest
from treecast.sampling.grammar import Grammars, Matcher, require_grammars
from treecast.sampling.params import SamplingParams

MOST_KEPT = 64
COMPILE_S = 10.0

Key = tuple[str, str]


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
        self._kept: OrderedDict[Key, asyncio.Future[Matcher]] = OrderedDict()

    @property
    def keeps_grammars(self) -> bool:
        """Whether a constraint can be kept at all."""
        return self._grammars is not None

    def close(self) -> None:
        """Drop what waits; does not wait for what is being compiled."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def ready(self, sampling: SamplingParams) -> Matcher | None:
        """A matcher at the beginning of the output, if the grammar has been compiled before."""
        found = self._kept.get(sampling.constraint)
        if found is None or not found.done() or found.cancelled() or found.exception():
            return None
        self._kept.move_to_end(sampling.constraint)
        return found.result().copy()

    async def matcher(self, sampling: SamplingParams) -> Matcher | None:
        """The request's matcher; None for one that asks for no constraint.

        Raises:
            InvalidRequest: the constraint is malformed, too complex, or not compiled in time; or
                nothing here can keep it.
        """
        kind, text = sampling.constraint
        if not kind:
            return None
        require_grammars(self._grammars, sampling)
        compiling = self._compiling(sampling)
        try:
            async with asyncio.timeout(self._limit_s):
                # Others may wait for the same grammar, so nobody's leaving ends its compiling.
                return (await asyncio.shield(compiling)).copy()
        except TimeoutError:
            raise InvalidRequest(
                f"{kind} of {len(text)} characters was not compiled in {self._limit_s:g} s"
            ) from None

    def _compiling(self, sampling: SamplingParams) -> asyncio.Future[Matcher]:
        key = sampling.constraint
        if key not in self._kept:
            grammars = require_grammars(self._grammars, sampling)
            loop = asyncio.get_running_loop()
            made = loop.run_in_executor(self._thread, grammars.matcher, sampling)
            made.add_done_callback(lambda done: self._drop_failed(key, done))
            self._kept[key] = made
            while len(self._kept) > self._most_kept:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _drop_failed(self, key: Key, done: asyncio.Future[Matcher]) -> None:
        if (done.cancelled() or done.exception()) and self._kept.get(key) is done:
            del self._kept[key]
