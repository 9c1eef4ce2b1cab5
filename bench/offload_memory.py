"""The resident memory of a process at its highest, by what it is of."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from treecast.settings import GIB

_SAMPLED_EVERY_S = 0.02
_FIELDS = {"anon_gib": "RssAnon", "file_gib": "RssFile", "all_gib": "VmRSS"}


class MemoryWatch:
    """The largest resident memory seen: our own (anonymous), files' pages, and both together."""

    def __init__(self) -> None:
        self.peaks = resident_memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @contextmanager
    def watching(self) -> Iterator[MemoryWatch]:
        """Sample within, fifty times a second."""
        self._thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLED_EVERY_S):
            now = resident_memory()
            self.peaks = {kind: max(size, now[kind]) for kind, size in self.peaks.items()}


def resident_memory() -> dict[str, float]:
    """GiB of this process that are resident now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines)
    return {kind: int(facts[field].split()[0]) * 1024 / GIB for kind, field in _FIELDS.items()}
