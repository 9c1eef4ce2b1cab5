"""What a verifier measures of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from treecast.telemetry.metrics import LATENCY_BUCKETS_S
from treecast.tree import TokenTree

from .calibration import Reliability

_STEP_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
_WAIT_BUCKETS_S = (0, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.5, 1.0)
_TOKEN_BUCKETS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24)
_COUNT_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
MAX_DEPTH_LABEL = 16
MAX_PROPOSER_LABELS = 32


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


class VerifierMetrics:
    """Prometheus metrics of one verifier; seconds and counts, labels bounded."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "treecast_verifier_requests_total",
            "Requests ended, by outcome: a finish reason or an error's reason.",
            ["outcome"],
            registry=registry,
        )
        self.first_token = Histogram(
            "treecast_verifier_time_to_first_token_seconds",
            "From the arrival of a request at the verifier to its first token.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.inter_token = Histogram(
            "treecast_verifier_inter_token_seconds",
            "Time between a request's commits divided by the tokens committed, once per commit.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
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
        self.tokens = Counter(
            "treecast_verifier_tokens_total", "Output tokens committed.", registry=registry
        )
        self.step_tokens = Histogram(
            "treecast_verifier_step_tokens",
            "Output tokens of one request in one step, accepted nodes and the one that follows.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self.prefill_tokens = Counter(
            "treecast_verifier_prefill_tokens_total",
            "Prompt tokens computed; those found in the KV cache are not counted.",
            registry=registry,
        )
        self.trees = Counter(
            "treecast_verifier_trees_total", "Trees received from speculators.", registry=registry
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
        self.speculators = Gauge(
            "treecast_verifier_speculators", "Speculators with an open stream.", registry=registry
        )
        self.pages = Gauge(
            "treecast_verifier_kv_pages", "KV pages by state: free, used.", ["state"],
            registry=registry,
        )  # fmt: skip
        self.running = Gauge(
            "treecast_verifier_running_requests", "Requests in the next step.", registry=registry
        )
        self.waiting = Gauge(
            "treecast_verifier_waiting_requests",
            "Requests that have not begun: they wait for a slot or for pages.",
            registry=registry,
        )
        self.paused = Gauge(
            "treecast_verifier_paused_requests",
            "Requests that have run and wait to go on.",
            registry=registry,
        )
        self.preemptions = Counter(
            "treecast_verifier_preemptions_total",
            "Running requests that were paused, by why: memory, since what runs has grown and KV "
            "pages ran out; length, since others went first.",
            ["why"],
            registry=registry,
        )
        for why in ("memory", "length"):
            self.preemptions.labels(why)
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
        self.wait = Histogram(
            "treecast_verifier_wait_seconds",
            "From the arrival of a request to its admission to the batch.",
            buckets=LATENCY_BUCKETS_S,
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

        self._proposers: set[str] = set()

    def proposer_label(self, name: str) -> str:
        """A proposer's name, or "other" once there are too many: names come from peers."""
        if len(self._proposers) < MAX_PROPOSER_LABELS:
            self._proposers.add(name)
        return name if name in self._proposers else "other"

    def watch(self, reliability: Callable[[], Iterable[Reliability]]) -> None:
        """Export predicted and accepted sums; they are read when metrics are asked for."""
        self.registry.register(_ReliabilityCollector(reliability))

    def watch_weights(self, moved_bytes: Callable[[], int]) -> None:
        """Export what has been moved; it is read when metrics are asked for."""
        self.registry.register(_MovedCollector(moved_bytes))

    def proposed(self, names: Iterable[str], verified: int, accepted: int) -> None:
        """Count nodes that these drafters agreed on."""
        for name in names:
            label = self.proposer_label(name)
            self.verified_by_proposer.labels(label).inc(verified)
            self.accepted_by_proposer.labels(label).inc(accepted)

    def planned(self, at_hand: int, granted: Iterable[TokenTree]) -> None:
        """Count what one plan made of the trees."""
        self.nodes_at_hand.inc(at_hand)
        for tree in granted:
            self.nodes_granted.inc(len(tree))
            if not tree.groups:
                self.predicted_tokens.inc(sum(tree.path_confidence()))

    def tree_verified(self, num_nodes: int, depth: int, accepted: int) -> None:
        """Count one tree of a step."""
        self.nodes_verified.inc(num_nodes)
        self.nodes_accepted.inc(accepted)
        for level in range(1, depth + 1):
            label = str(min(level, MAX_DEPTH_LABEL))
            self.offered_depth.labels(label).inc()
            self.accepted_depth.labels(label).inc(level <= accepted)
