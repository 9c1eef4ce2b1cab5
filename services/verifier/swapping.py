"""Where the KV of paused requests is: in the pool, in host memory, or to be computed again."""

from __future__ import annotations

from treecast.engine.base import Engine

from .metrics.memory import MemoryMetrics
from .requests import Request


class SwapSpace:
    """Host memory for the KV of paused requests; what does not fit is dropped.

    Attributes:
        used_bytes: what is there now; never above the limit.
    """

    def __init__(self, engine: Engine, limit_bytes: int, metrics: MemoryMetrics) -> None:
        self._engine = engine
        self._limit_bytes = limit_bytes
        self._metrics = metrics
        self.used_bytes = 0

    def put_out(self, request: Request) -> None:
        """Take a request's KV out of the pool: to host memory if it fits there."""
        sequence, request.sequence = request.sequence, None
        assert sequence is not None
        nbytes = sequence.length * self._engine.usage.position_bytes
        if self.used_bytes + nbytes <= self._limit_bytes:
            request.swapped = self._engine.swap_out(sequence)
            self.used_bytes += request.swapped.nbytes
            self._metrics.swapped_bytes.labels("out").inc(request.swapped.nbytes)
        else:
            self._metrics.dropped_tokens.inc(sequence.length)
            self._engine.free(sequence)

    def bring_back(self, request: Request, capacity: int) -> None:
        """Put a request's swapped KV into the pool.

        Raises:
            Overloaded: too few pages are free; nothing has changed.
        """
        assert request.swapped is not None
        request.sequence = self._engine.swap_in(request.swapped, capacity)
        self._metrics.swapped_bytes.labels("in").inc(request.swapped.nbytes)
        self._forget(request)

    def discard(self, request: Request) -> None:
        """Drop a request's swapped KV, if it has any."""
        if request.swapped is not None:
            self._engine.discard(request.swapped)
            self._forget(request)

    def _forget(self, request: Request) -> None:
        assert request.swapped is not None
        self.used_bytes -= request.swapped.nbytes
        request.swapped = None
