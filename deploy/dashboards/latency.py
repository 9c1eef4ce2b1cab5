"""Dashboard *Latency and traffic*: what callers see of the routers."""

from __future__ import annotations

from .panels import Dashboard, Heatmap, Panel, Query, Row
from .promql import (
    CALLER,
    MODEL_VARIABLE,
    POD_VARIABLE,
    TENANT_VARIABLE,
    buckets,
    gauge,
    mean,
    per_second,
    quantile,
    quantiles,
)

_FIRST_TOKEN = "treecast_router_time_to_first_token_seconds"
_INTER_TOKEN = "treecast_router_inter_token_seconds"
_WHOLE = "treecast_router_request_seconds"
_QUEUE = "treecast_router_queue_wait_seconds"

_LATENCY = Row(
    "Latency",
    (
        Panel(
            "Time to first token",
            "From a request's arrival at the router to its first token on the way back.",
            "s",
            quantiles(_FIRST_TOKEN, CALLER),
        ),
        Panel(
            "Inter-token",
            "Time between two deliveries divided by the tokens that came.",
            "s",
            quantiles(_INTER_TOKEN, CALLER),
        ),
        Panel(
            "End to end",
            "From arrival to end, of requests that finished; long answers take long.",
            "s",
            quantiles(_WHOLE, CALLER),
        ),
        Heatmap(
            "Time to first token, distribution",
            "Two bright rows: cached prompts and new ones, or a queue that some had to wait in.",
            "s",
            buckets(_FIRST_TOKEN, CALLER),
        ),
        Heatmap(
            "Inter-token, distribution",
            "Steps without an accepted node lie above those with some.",
            "s",
            buckets(_INTER_TOKEN, CALLER),
        ),
        Heatmap(
            "End to end, distribution",
            "As long as answers are.",
            "s",
            buckets(_WHOLE, CALLER),
        ),
    ),
)

_WAITING = Row(
    "Queue",
    (
        Panel(
            "Queue wait by priority, p95",
            "From joining the router's queue to a place on a verifier; 10 goes first.",
            "s",
            (Query(quantile(0.95, _QUEUE, "priority", CALLER), "priority {{priority}}"),),
        ),
        Heatmap(
            "Queue wait, distribution",
            "All at the bottom: nobody waits.",
            "s",
            buckets(_QUEUE, CALLER),
        ),
        Panel(
            "Requests in routers",
            "Accepted and not ended, and those of them in the queue.",
            "short",
            (
                Query(gauge("treecast_router_running_requests", "pod"), "running in {{pod}}"),
                Query(gauge("treecast_router_queue_requests", "pod"), "queued in {{pod}}"),
            ),
        ),
        Panel(
            "Guesses of lengths, how far off",
            "In doublings, by what the guess came from: 1 is off by a factor of 2.",
            "short",
            (Query(mean("treecast_router_length_error_doublings", "source"), "{{source}}"),),
        ),
    ),
)

_TRAFFIC = Row(
    "Traffic",
    (
        Panel(
            "Requests by outcome",
            "Requests ended, by finish reason, error, or client_gone.",
            "reqps",
            (
                Query(
                    per_second("treecast_router_requests_total", "outcome", CALLER), "{{outcome}}"
                ),
            ),
            stack=True,
        ),
        Panel(
            "Tokens by tenant",
            "Output tokens per second.",
            "ops",
            (Query(per_second("treecast_router_tokens_total", "tenant", CALLER), "{{tenant}}"),),
            stack=True,
        ),
        Panel(
            "Tokens by model",
            "Output tokens per second.",
            "ops",
            (Query(per_second("treecast_router_tokens_total", "model", CALLER), "{{model}}"),),
            stack=True,
        ),
        Panel(
            "Requests placed anew",
            "Running samples that went to another verifier: theirs was lost, handed them over, or "
            "knew a newer lease.",
            "ops",
            (Query(per_second("treecast_router_replacements_total", "why"), "{{why}}"),),
        ),
    ),
)

LATENCY = Dashboard(
    "treecast-latency",
    "treecast / Latency and traffic",
    "What callers see: latency, queue, traffic by outcome, tenant and model.",
    (MODEL_VARIABLE, TENANT_VARIABLE, POD_VARIABLE),
    (_LATENCY, _WAITING, _TRAFFIC),
)
