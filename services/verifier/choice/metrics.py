"""What a verifier measures of its choice of speculators; label values bounded."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from treecast.wire.frames import Hello

MAX_LABELS = 16
OTHER = "other"


class BoundedLabels:
    """The first `MAX_LABELS` names as they are, any more as "other"."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def bound(self, name: str) -> str:
        """`name`, or "other" once there are too many."""
        if name not in self._names and len(self._names) >= MAX_LABELS:
            return OTHER
        self._names.add(name)
        return name

    def release(self, name: str) -> bool:
        """Make room; whether the name was held."""
        held = name in self._names
        self._names.discard(name)
        return held


class ChoiceMetrics:
    """Prometheus metrics of the policies."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._kinds, self._voters = BoundedLabels(), BoundedLabels()
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
