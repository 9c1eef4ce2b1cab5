"""What a verifier measures of its choice of speculators."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from treecast.wire.frames import Hello

from .labels import OTHER, BoundedLabels

MAX_LABELS = 16


class ChoiceMetrics:
    """Prometheus metrics of the policies; labels bounded."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._kinds, self._voters = BoundedLabels(MAX_LABELS), BoundedLabels(MAX_LABELS)
        self.choices = Counter(
            "treecast_verifier_speculator_choices_total",
            "Decisions for a speculator, by its proposers and model; staying counts.",
            ["speculator"],
            registry=registry,
        )
        self.switches = Counter(
            "treecast_verifier_speculator_switches_total",
            "Switches of a request to another speculator: begun, done, abandoned.",
            ["outcome"],
            registry=registry,
        )
        self.vote_weight = Gauge(
            "treecast_verifier_vote_weight",
            "Weight of a voter over all requests; their mean is 1.",
            ["voter"],
            registry=registry,
        )
        self.length = Gauge(
            "treecast_verifier_speculation_length_tokens",
            "Length that voted chains are cut to.",
            registry=registry,
        )

    def chose(self, peer: Hello) -> None:
        """Count a decision for a speculator."""
        kind = "+".join(peer.proposers) + (f":{peer.model}" if peer.model else "")
        self.choices.labels(self._kinds.bound(kind)).inc()

    def weigh(self, voter: str, weight: float) -> None:
        """Show a voter's weight; those over the bound are left out, since they share a label."""
        if (label := self._voters.bound(voter)) != OTHER:
            self.vote_weight.labels(label).set(weight)

    def forget(self, voter: str) -> None:
        """Show a voter's weight no more."""
        if self._voters.release(voter):
            self.vote_weight.remove(voter)
