"""What a verifier measures of trees: what came, what was verified, what it was worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from treecast.services.verifier.calibration import Reliability

from .labels import BoundedLabels

MAX_DEPTH_LABEL = 16
MAX_PROPOSER_LABELS = 32


class TreeMetrics:
    """Prometheus metrics of speculation; labels bounded."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._proposers = BoundedLabels(MAX_PROPOSER_LABELS)
        self.speculators = Gauge(
            "treecast_verifier_speculators", "Speculators with an open stream.", registry=registry
        )
        self.received = Counter(
            "treecast_verifier_trees_total", "Trees received from speculators.", registry=registry
        )
        self.nodes_offered = Counter(
            "treecast_verifier_tree_nodes_offered_total",
            "Tree nodes received from speculators.",
            registry=registry,
        )
        self.nodes_verified = Counter(
            "treecast_verifier_tree_nodes_verified_total",
            "Tree nodes that a step computed.",
            registry=registry,
        )
        self.nodes_accepted = Counter(
            "treecast_verifier_tree_nodes_accepted_total",
            "Tree nodes accepted.",
            registry=registry,
        )
        self.verified_by_proposer = Counter(
            "treecast_verifier_verified_by_proposer_total",
            "Tree nodes that a step computed, by the drafters that proposed them.",
            ["proposer"],
            registry=registry,
        )
        self.accepted_by_proposer = Counter(
            "treecast_verifier_accepted_by_proposer_total",
            "Tree nodes accepted, by the drafters that proposed them; a node counts for each.",
            ["proposer"],
            registry=registry,
        )
        self.offered_depth = Counter(
            "treecast_verifier_offered_by_depth_total",
            "Verified trees that reached this depth; the last label holds all deeper ones.",
            ["depth"],
            registry=registry,
        )
        self.accepted_depth = Counter(
            "treecast_verifier_accepted_by_depth_total",
            "Verified trees whose accepted path reached this depth.",
            ["depth"],
            registry=registry,
        )
        self.run_ahead_hits = Counter(
            "treecast_verifier_run_ahead_hits_total",
            "Trees grown from an older commit that were of use after re-rooting.",
            registry=registry,
        )
        self.stale_frames = Counter(
            "treecast_verifier_stale_frames_total",
            "Speculator frames for text that was not committed, or for no session.",
            registry=registry,
        )
        self.bad_frames = Counter(
            "treecast_verifier_bad_frames_total",
            "Malformed speculator frames; each ends its session's speculation there.",
            registry=registry,
        )

    def watch(self, reliability: Callable[[], Iterable[Reliability]]) -> None:
        """Export predicted and accepted sums; they are read when metrics are asked for."""
        self._registry.register(_ReliabilityCollector(reliability))

    def proposer_label(self, name: str) -> str:
        """A proposer's name, or "other" once there are too many: names come from peers."""
        return self._proposers.bound(name)

    def proposed(self, names: Iterable[str], verified: int, accepted: int) -> None:
        """Count nodes that these drafters agreed on."""
        for name in names:
            label = self.proposer_label(name)
            self.verified_by_proposer.labels(label).inc(verified)
            self.accepted_by_proposer.labels(label).inc(accepted)

    def verified(self, num_nodes: int, depth: int, accepted: int) -> None:
        """Count one tree of a step."""
        self.nodes_verified.inc(num_nodes)
        self.nodes_accepted.inc(accepted)
        for level in range(1, depth + 1):
            label = str(min(level, MAX_DEPTH_LABEL))
            self.offered_depth.labels(label).inc()
            self.accepted_depth.labels(label).inc(level <= accepted)


class _ReliabilityCollector(Collector):
    """Turns calibration sums into metrics at each scrape, so that a step pays nothing for them."""

    def __init__(self, reliability: Callable[[], Iterable[Reliability]]) -> None:
        self._reliability = reliability

    def collect(self) -> Iterator[Metric]:
        labels = ["proposer", "confidence"]
        predicted = CounterMetricFamily(
            "treecast_verifier_predicted_by_confidence",
            "Confidence summed over tree nodes whose parent was accepted, by proposer and bin; the "
            "label is the middle of the bin.",
            labels=labels,
        )
        accepted = CounterMetricFamily(
            "treecast_verifier_accepted_by_confidence",
            "How many of those nodes were accepted; equal sums mean a well calibrated proposer.",
            labels=labels,
        )
        for each in self._reliability():
            at = [each.proposer, f"{each.centre:.3f}"]
            predicted.add_metric(at, each.predicted)
            accepted.add_metric(at, each.accepted)
        yield predicted
        yield accepted
