"""What a device can do at most, measured: bytes and operations a second."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

_COPIED_BYTES = 1 << 30
_SIDE = 8192
_WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes read and written a second by a copy, and bfloat16 operations a second by a product."""

    device: str
    bytes_per_s: float
    operations_per_s: float


def measure_ceilings() -> Ceilings:
    """On the current CUDA device, with random numbers. Blocks for a second."""
    source = torch.randint(256, (_COPIED_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_s = median_s(lambda: target.copy_(source))
    a, b = torch.randn(2, _SIDE, _SIDE, device="cuda", dtype=torch.bfloat16)
    product_s = median_s(lambda: torch.mm(a, b))
    return Ceilings(
        torch.cuda.get_device_name(), 2 * _COPIED_BYTES / copy_s, 2 * _SIDE**3 / product_s
    )


def median_s(run: Callable[[], object], repeats: int = 20) -> float:
    """Seconds on the device of one call, by events, after a warm-up."""
    for _ in range(_WARM_UPS):
        run()
    times: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def graphed_s(runs: list[Callable[[], object]]) -> float:
    """Seconds of one of several calls, captured together: no launch gaps.

    Give calls over different data, more than fits the device's cache, so that none of it is hit.
    """
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return median_s(graph.replay) / len(runs)
