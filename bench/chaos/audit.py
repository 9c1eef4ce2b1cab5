"""What is left over when all is quiet: pages, sessions, streams, file descriptors, memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from treecast.bench.scrape import scrape
from treecast.services.local import ServiceProcess

from .mesh import SESSION_TTL_S, ChaosMesh

QUIET_S = 30.0
_POLL_S = 0.25

_HELD = {
    "router": {
        "requests": "treecast_router_running_requests",
        "queued": "treecast_router_queue_requests",
    },
    "verifier": {
        "KV pages": "treecast_verifier_kv_pages/used",
        "requests": "treecast_verifier_running_requests",
        "waiting": "treecast_verifier_waiting_requests",
        "sessions": "treecast_verifier_retained_sessions",
    },
    "speculator": {"sessions": "treecast_speculator_sessions"},
}


@dataclass(frozen=True, slots=True)
class Holding:
    """What one process holds.

    Attributes:
        counts: by name: KV pages, requests, sessions; all zero when nothing leaks.
    """

    counts: Mapping[str, int]
    num_fds: int
    rss_mib: float

    @property
    def held(self) -> int:
        return sum(self.counts.values())


async def take_stock(mesh: ChaosMesh) -> dict[str, Holding]:
    """Every service's holdings, as soon as none holds anything, or after 30 s."""
    deadline_s = time.monotonic() + QUIET_S + SESSION_TTL_S
    while True:
        stock = {
            name: await asyncio.to_thread(_holding, mesh.processes[name], role_of(name))
            for name in mesh.services
        }
        if not any(one.held for one in stock.values()) or time.monotonic() > deadline_s:
            return stock
        await asyncio.sleep(_POLL_S)


def role_of(name: str) -> str:
    role = name.partition("-")[0]
    return role if role in _HELD else "speculator"


def _holding(process: ServiceProcess, role: str) -> Holding:
    values = read_metrics(process)
    counts = {what: int(values[metric]) for what, metric in _HELD[role].items()}
    system = psutil.Process(process.pid)
    return Holding(counts, system.num_fds(), rss_mib(process))


def rss_mib(process: ServiceProcess) -> float:
    return float(psutil.Process(process.pid).memory_info().rss) / 2**20


def read_metrics(process: ServiceProcess) -> dict[str, float]:
    """Gauges and counters by name, and by name/state where there is that label."""
    values: dict[str, float] = {}
    for sample in scrape(process):
        state = sample.labels.get("state")
        values[f"{sample.name}/{state}" if state else sample.name] = sample.value
    return values
