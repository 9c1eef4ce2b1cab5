"""How far a model is read, told in the log while it lasts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog

from treecast.model_folder import stored_tensors
from treecast.settings import GIB

_EVERY_S = 5.0

_log = structlog.get_logger()


class LoadProgress:
    """Counts bytes that were read, and says so every few seconds."""

    def __init__(self, total_bytes: int) -> None:
        self._total = total_bytes
        self._done = 0.0
        self._told = time.monotonic()

    def add(self, num_bytes: float) -> None:
        """So many more were read."""
        self._done += num_bytes
        if time.monotonic() - self._told > _EVERY_S:
            self._told = time.monotonic()
            done, total = (round(count / GIB, 2) for count in (self._done, self._total))
            _log.info("model.reading", done_gib=done, total_gib=total)


@contextmanager
def reading_told(folder: Path) -> Iterator[None]:
    """Have transformers' reading of a folder told in the log rather than by a bar."""
    from transformers.utils import logging

    if not hasattr(logging, "set_tqdm_hook"):  # older releases have bars alone
        yield
        return
    sizes = {tensor.name: tensor.num_bytes for tensor in stored_tensors(folder)}
    total = sum(sizes.values())

    def hook(factory: Any, args: Any, kwargs: Any) -> Any:
        if not args or not sizes:
            return factory(*args, **kwargs)
        return _told(args[0], sizes, LoadProgress(total))

    before = logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _told(
    named: Iterable[tuple[str, Any]], sizes: dict[str, int], progress: LoadProgress
) -> Iterator[tuple[str, Any]]:
    """The same items; one that is stored under another name counts as an average one."""
    average = sum(sizes.values()) / len(sizes)
    for item in named:
        yield item
        progress.add(sizes.get(item[0], average))
