"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_FAR_BYTES = 256 * 2**20
_SIDE = 1024


def describe_machine() -> dict[str, object]:
    """Processor, cores that we may use, operating system and Python."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a step cannot be quicker than; the best of several tries, by torch, in float32.

    Attributes:
        read_bytes_per_s: of memory far larger than any cache.
        products_per_s: multiply-adds in a large product of matrices.
    """

    read_bytes_per_s: float
    products_per_s: float


def measure_ceilings(clock: Callable[[], float] = time.perf_counter, tries: int = 7) -> Ceilings:
    """Measure them with torch's number of threads. Blocks for a second or so; needs 300 MB."""
    import torch

    far = torch.ones(_FAR_BYTES // 4)
    side = torch.ones(_SIDE, _SIDE)
    with torch.inference_mode():
        read_s = min(_seconds(clock, far.sum) for _ in range(tries))
        product_s = min(_seconds(clock, lambda: side @ side) for _ in range(tries))
    return Ceilings(far.nbytes / read_s, _SIDE**3 / product_s)


def _seconds(clock: Callable[[], float], act: Callable[[], object]) -> float:
    began = clock()
    act()
    return clock() - began
