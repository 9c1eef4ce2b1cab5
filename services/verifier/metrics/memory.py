"""What a verifier measures of memory: where keys, values and weights are, and what moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector


class MemoryMetrics:
    """Prometheus metrics of KV and weights."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.pages = Gauge(
            "treecast_verifier_kv_pages",
            "KV pages by state: free, used.",
            ["state"],
            registry=registry,
        )
        self.swapped = Gauge(
            "treecast_verifier_swapped_bytes",
            "Host memory that the KV of paused requests takes now; --swap-gib at most.",
            registry=registry,
        )
        self.swapped_bytes = Counter(
            "treecast_verifier_swap_bytes_total",
            "KV of paused requests moved between the pool and host memory, by direction: out, in.",
            ["direction"],
            registry=registry,
        )
        for direction in ("out", "in"):
            self.swapped_bytes.labels(direction)
        self.dropped_tokens = Counter(
            "treecast_verifier_dropped_kv_tokens_total",
            "Positions of paused requests whose KV had no room in host memory either; they are "
            "computed again.",
            registry=registry,
        )
        self.retained = Gauge(
            "treecast_verifier_retained_sessions", "Idle sessions with KV.", registry=registry
        )
        self.evicted = Counter(
            "treecast_verifier_evicted_sessions_total",
            "Idle sessions whose KV was freed, by why: expired, or pressure of a request.",
            ["why"],
            registry=registry,
        )
        for why in ("expired", "pressure"):
            self.evicted.labels(why)

    def watch_weights(self, moved_bytes: Callable[[], int]) -> None:
        """Export what has been moved; it is read when metrics are asked for."""
        self._registry.register(_MovedCollector(moved_bytes))


class _MovedCollector(Collector):
    """Reads what the engine has counted, at each scrape."""

    def __init__(self, moved_bytes: Callable[[], int]) -> None:
        self._moved_bytes = moved_bytes

    def collect(self) -> Iterator[Metric]:
        moved = CounterMetricFamily(
            "treecast_verifier_weights_moved_bytes",
            "Bytes of weights brought to the device for passes; 0 without --offload. Over output "
            "tokens it falls as trees are accepted.",
        )
        moved.add_metric([], self._moved_bytes())
        yield moved
