"""What every service says of itself: what it is, which models it serves, whether it is leaving.

All of it is read at each scrape, from the scraping thread; the callbacks only look at state.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class ProcessCollector(Collector):
    """Metrics that are the same in a router, a verifier and a speculator."""

    def __init__(
        self, role: str, models: Callable[[], Iterable[str]], draining: Callable[[], bool]
    ) -> None:
        """Look at nothing yet.

        Args:
            models: target models that the process takes part in serving: a verifier's own, a
                router's and a speculator's by the verifiers that they are connected to. So
                `treecast_model_info` tells which pods belong to a model.
        """
        self._role = role
        self._models = models
        self._draining = draining

    def collect(self) -> Iterator[Metric]:
        labels = ["role", "version"]
        build = GaugeMetricFamily("treecast_build_info", "1; what this process is.", labels=labels)
        build.add_metric([self._role, version("treecast")], 1)
        models = GaugeMetricFamily(
            "treecast_model_info",
            "1 for each target model that this process takes part in serving.",
            labels=["role", "model"],
        )
        for model in sorted(set(self._models())):
            models.add_metric([self._role, model], 1)
        yield build
        yield models
        yield GaugeMetricFamily(
            "treecast_draining",
            "1 from the moment on in which the process takes nothing new because it is to stop.",
            value=float(self._draining()),
        )
        yield device_memory()


def device_memory() -> Metric:
    """Memory of the devices that this process computes on; GPUs only once torch uses them."""
    family = GaugeMetricFamily(
        "treecast_device_memory_bytes",
        "Memory by device and state. cpu: resident (this process), total (the machine). cuda:N: "
        "allocated and reserved (this process, by torch), free and total (the device).",
        labels=["device", "state"],
    )
    page = os.sysconf("SC_PAGE_SIZE")
    family.add_metric(["cpu", "resident"], _resident_pages() * page)
    family.add_metric(["cpu", "total"], os.sysconf("SC_PHYS_PAGES") * page)
    for device, state, num_bytes in _cuda_memory(sys.modules.get("torch")):
        family.add_metric([device, state], num_bytes)
    return family


def _resident_pages() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1])


def _cuda_memory(torch: Any) -> Iterator[tuple[str, str, int]]:
    """Of the devices in use. `torch` is the module if somebody loaded it: we never do."""
    if torch is None or not torch.cuda.is_initialized():
        return
    for index in range(torch.cuda.device_count()):
        reserved = torch.cuda.memory_reserved(index)
        if not reserved:
            continue
        free, total = torch.cuda.mem_get_info(index)
        yield f"cuda:{index}", "allocated", torch.cuda.memory_allocated(index)
        yield f"cuda:{index}", "reserved", reserved
        yield f"cuda:{index}", "free", free
        yield f"cuda:{index}", "total", total
