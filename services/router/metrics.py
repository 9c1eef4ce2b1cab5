"""What a router measures of itself."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from treecast.telemetry.metrics import LATENCY_BUCKETS_S

from .lengths import Source
from .placement import PlacedBy

_REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_DOUBLINGS = (0.125, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
_CALLER = ["tenant", "model"]
_BREAKDOWNS = ("lost", "handed_over", "stale_lease")


@dataclass(slots=True)
class Caller:
    """Whom a request is counted for.

    Tenants are those that the router knows, models those that its verifiers serve: what a client
    writes in a request becomes no label.

    Attributes:
        tenant: empty until the caller is known.
        model: empty until the request's model was found.
    """

    tenant: str = ""
    model: str = ""


class RouterMetrics:
    """Prometheus metrics of one router; seconds and counts, labels bounded."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "treecast_router_requests_total",
            "Requests ended, by outcome: a finish reason, an error's reason, or client_gone; model "
            "is empty if they ended before it was known.",
            ["outcome", *_CALLER],
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
            _CALLER,
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.inter_token = Histogram(
            "treecast_router_inter_token_seconds",
            "Time between a sample's deltas divided by the tokens that came, once per delta.",
            _CALLER,
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.duration = Histogram(
            "treecast_router_request_seconds",
            "From the arrival of a request to its end; only those that finished.",
            _CALLER,
            buckets=_REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.tokens = Counter(
            "treecast_router_tokens_total", "Output tokens relayed.", _CALLER, registry=registry
        )
        self.queued = Gauge(
            "treecast_router_queue_requests", "Requests waiting for a verifier.", registry=registry
        )
        self.queue_wait = Histogram(
            "treecast_router_queue_wait_seconds",
            "From joining the queue to a place on a verifier, by the request's priority (-10..10); "
            "placed requests only.",
            [*_CALLER, "priority"],
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
        for why in _BREAKDOWNS:
            self.replacements.labels(why)
        for by in PlacedBy:
            self.placements.labels(by.value)
        self.length_guesses = Counter(
            "treecast_router_length_guesses_total",
            "Guesses of an output's length by what they came from: alike (past prompts like it), "
            "typical (the median of tenant and model), limit (max_tokens).",
            ["source"],
            registry=registry,
        )
        self.length_error = Histogram(
            "treecast_router_length_error_doublings",
            "How far off the guess of an output's length was, once it ended by itself, as the size "
            "of log2(actual / guess): 1 is off by a factor of 2. By what the guess came from.",
            ["source"],
            buckets=_DOUBLINGS,
            registry=registry,
        )
        for source in Source:
            self.length_guesses.labels(source.value)
            self.length_error.labels(source.value)
        self.streams = Gauge(
            "treecast_router_verifier_streams", "Verifiers with an open stream.", registry=registry
        )
