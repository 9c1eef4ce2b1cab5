"""What a router measures of itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from treecast.telemetry.metrics import LATENCY_BUCKETS_S


class RouterMetrics:
    """Prometheus metrics of one router; seconds and counts, labels bounded."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "treecast_router_requests_total",
            "Requests ended, by outcome: a finish reason, an error's reason, or client_gone.",
            ["outcome"],
            registry=registry,
        )
        self.running = Gauge(
            "treecast_router_running_requests",
            "Requests accepted and not ended, those in the queue included.",
            registry=registry,
        )
        self.first_token = Histogram(
            "treecast_router_time_to_first_token_seconds",
            "From the arrival of a request to its first token on the way to the client.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.inter_token = Histogram(
            "treecast_router_inter_token_seconds",
            "Time between a sample's deltas divided by the tokens that came, once per delta.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.tokens = Counter(
            "treecast_router_tokens_total", "Output tokens relayed.", registry=registry
        )
        self.queued = Gauge(
            "treecast_router_queue_requests", "Requests waiting for a verifier.", registry=registry
        )
        self.queue_wait = Histogram(
            "treecast_router_queue_wait_seconds",
            "From joining the queue to a place on a verifier; placed requests only.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.placements = Counter(
            "treecast_router_placements_total",
            "Placements by what decided: affinity (lease), prefix, rendezvous (hash), or load.",
            ["by"],
            registry=registry,
        )
        self.replacements = Counter(
            "treecast_router_replacements_total",
            "Running samples placed anew, by why: lost, handed_over or stale_lease.",
            ["why"],
            registry=registry,
        )
        self.streams = Gauge(
            "treecast_router_verifier_streams", "Verifiers with an open stream.", registry=registry
        )
        self.redis_up = Gauge(
            "treecast_router_redis_up",
            "1 while Redis answers; 0 while sessions are placed by hash.",
            registry=registry,
        )
