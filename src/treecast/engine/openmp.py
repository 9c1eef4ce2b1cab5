"""Where OpenMP's threads run, and what they do between passes. Imports nothing that loads torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

SPIN_COUNT = 10_000
"""Turns that an idle thread spins before it sleeps, well under 0.1 ms.

By default it spins for milliseconds, and whoever is next on the core waits: measured on two cores,
one contended draft pass took 350 ms instead of 12. At 0 it sleeps at once, and each of a step's
hundreds of regions pays for waking it: a 20 ms step took 42. From 2,000 on the step is as quick as
with endless spinning.
"""


def spin_briefly() -> None:
    """Have this process and its children share cores well. Before torch is imported."""
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def load_on_thread(load: Callable[[], T]) -> tuple[ThreadPoolExecutor, T]:
    """Load an engine on a thread of its own, the only one that is to run it. Blocks.

    Call it before torch is imported, on the thread of the event loop. Each thread that runs a
    parallel region gets a team of its own, and with more teams than cores the OpenMP library stops
    all threads from spinning: one parallel copy on the event loop's thread made every later step
    take 41 ms instead of 20. So that thread is held to one; the engine sets its own number.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    spin_briefly()
    thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
    loaded = thread.submit(load).result()
    if "torch" in sys.modules:
        _hold_this_thread()
    return thread, loaded


def _hold_this_thread() -> None:
    import torch

    torch.get_num_threads()  # a thread's first use of torch takes over what others have set
    torch.set_num_threads(1)
