"""What a verifier measures of its steps: their time, their rows, what the plan expects of trees."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from treecast.tree import TokenTree

_STEP_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
_WAIT_BUCKETS_S = (0, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.5, 1.0)
_COUNT_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


class StepMetrics:
    """Prometheus metrics of the step loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.phase = Histogram(
            "treecast_verifier_step_phase_seconds",
            "Time of each phase of a step: collect, plan, forward, walk, commit.",
            ["phase"],
            buckets=_STEP_BUCKETS_S,
            registry=registry,
        )
        self.batch_size = Histogram(
            "treecast_verifier_batch_requests",
            "Requests in a step.",
            buckets=_COUNT_BUCKETS,
            registry=registry,
        )
        self.batch_rows = Histogram(
            "treecast_verifier_batch_rows",
            "Rows in a step: prefill chunks, roots and tree nodes.",
            buckets=_COUNT_BUCKETS,
            registry=registry,
        )
        self.prefill_tokens = Counter(
            "treecast_verifier_prefill_tokens_total",
            "Prompt tokens computed; those found in the KV cache are not counted.",
            registry=registry,
        )
        self.draft_wait = Histogram(
            "treecast_verifier_draft_wait_seconds",
            "Time that a step waited for trees which speculators owed it, 0 included; steps that "
            "were owed none are not counted.",
            buckets=_WAIT_BUCKETS_S,
            registry=registry,
        )
        self.nodes_at_hand = Counter(
            "treecast_verifier_plan_nodes_at_hand_total",
            "Tree nodes that a step could have computed.",
            registry=registry,
        )
        self.nodes_granted = Counter(
            "treecast_verifier_plan_nodes_granted_total",
            "Tree nodes that the plan gave a row of the step.",
            registry=registry,
        )
        self.predicted_tokens = Counter(
            "treecast_verifier_plan_predicted_tokens_total",
            "Accepted tokens that the plan expected of the nodes it granted; trees of draws (law "
            "mss) are not priced and not counted.",
            registry=registry,
        )
        self.goodput = Gauge(
            "treecast_verifier_goodput_tokens_per_second",
            "What a second is worth to the plan: tokens that one request gets of it lately; 0 with "
            "--planner full.",
            registry=registry,
        )

    def planned(self, at_hand: int, granted: Iterable[TokenTree]) -> None:
        """Count what one plan made of the trees."""
        self.nodes_at_hand.inc(at_hand)
        for tree in granted:
            self.nodes_granted.inc(len(tree))
            if not tree.groups:
                self.predicted_tokens.inc(sum(tree.path_confidence()))
