"""What a verifier measures of requests: how long they wait, how fast they grow, how they end."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from treecast.telemetry.metrics import LATENCY_BUCKETS_S

_TOKEN_BUCKETS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24)


class RequestMetrics:
    """Prometheus metrics of the requests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.ended = Counter(
            "treecast_verifier_requests_total",
            "Requests ended, by outcome: a finish reason or an error's reason.",
            ["outcome"],
            registry=registry,
        )
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
        self.wait = Histogram(
            "treecast_verifier_wait_seconds",
            "From the arrival of a request to its admission to the batch.",
            buckets=LATENCY_BUCKETS_S,
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
        self.tokens = Counter(
            "treecast_verifier_tokens_total", "Output tokens committed.", registry=registry
        )
        self.step_tokens = Histogram(
            "treecast_verifier_step_tokens",
            "Output tokens of one request in one step, accepted nodes and the one that follows.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
