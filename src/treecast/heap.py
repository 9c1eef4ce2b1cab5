"""Garbage collection of a process that serves."""

from __future__ import annotations

import gc

THRESHOLDS = (10_000, 20, 50)
"""Python's are (700, 10, 10): made for scripts, they search the whole heap of a router with 2,000
streams, for .4 s each time, again and again while it takes them up."""


def settle_heap() -> None:
    """Look no more through what is there now, and rarely through what comes.

    What is freed by counting references, which is nearly all, is freed as before. To be called once
    everything is loaded, and again when much of that has been replaced: cycles among what was there
    before stay until then. Takes .3 s beside torch, in which nothing else runs.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
