"""What a verifier measures of itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from .choice import ChoiceMetrics
from .memory import MemoryMetrics
from .requests import RequestMetrics
from .steps import StepMetrics
from .trees import TreeMetrics


class VerifierMetrics:
    """Prometheus metrics of one verifier, by subject; seconds and counts, labels bounded."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = RequestMetrics(registry)
        self.steps = StepMetrics(registry)
        self.trees = TreeMetrics(registry)
        self.choice = ChoiceMetrics(registry)
        self.memory = MemoryMetrics(registry)
