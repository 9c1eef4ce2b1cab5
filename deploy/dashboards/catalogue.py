"""Every metric of every service, as the code declares it; no service is started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from treecast.services.router.metrics import RouterMetrics
from treecast.services.speculator.metrics import SpeculatorMetrics
from treecast.services.verifier.metrics import VerifierMetrics
from treecast.telemetry.process import ProcessCollector
from treecast.wire.guarded_redis import GuardedRedis


@dataclass(frozen=True, slots=True)
class Declared:
    """One metric; `name` is a counter's with its _total."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


def catalogue() -> dict[str, tuple[Declared, ...]]:
    """Metrics by who has them: router, verifier, speculator, and "all" for those of every one."""
    verifier = VerifierMetrics()
    verifier.trees.watch(lambda: ())
    verifier.memory.watch_weights(lambda: 0)
    shared = CollectorRegistry()
    shared.register(ProcessCollector("router", lambda: ["model"], lambda: False))
    GuardedRedis("redis://127.0.0.1:1").measure(shared)
    registries = {
        "all": shared,
        "router": RouterMetrics().registry,
        "verifier": verifier.registry,
        "speculator": SpeculatorMetrics().registry,
    }
    return {who: tuple(_declared(registry)) for who, registry in registries.items()}


def _declared(registry: CollectorRegistry) -> Iterator[Declared]:
    labels = dict(_labels(registry))
    for family in registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        yield Declared(name, family.type, labels[family.name], family.documentation)


def _labels(registry: CollectorRegistry) -> Iterator[tuple[str, tuple[str, ...]]]:
    """prometheus_client shows a metric's label names nowhere else than in this attribute."""
    collectors: Any = registry._collector_to_names
    for collector in collectors:
        if hasattr(collector, "_labelnames"):
            yield collector._name, tuple(collector._labelnames)
            continue
        family: Metric
        for family in collector.collect():
            yield family.name, tuple(getattr(family, "_labelnames", ()))
