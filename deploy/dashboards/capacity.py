"""Dashboard *Capacity*: KV cache, steps, devices, Redis and placement."""

from __future__ import annotations

from .panels import Dashboard, Heatmap, Panel, Query, Row
from .promql import (
    CALLER,
    MODEL_VARIABLE,
    POD,
    POD_VARIABLE,
    TENANT_VARIABLE,
    buckets,
    gauge,
    mean,
    per_second,
    quantile,
    quantiles,
)

_PAGES = "treecast_verifier_kv_pages"
_PHASE = "treecast_verifier_step_phase_seconds"
_REDIS = "treecast_redis_command_seconds"
_PLACED = "treecast_router_placements_total"

_USED = f'{POD},state="used"'
_BY_AFFINITY = f'{POD},by="affinity"'

_KV = Row(
    "KV cache",
    (
        Panel(
            "KV pages",
            "Pages by state; those of idle sessions count as used, and are freed when needed.",
            "short",
            (Query(gauge(_PAGES, "state"), "{{state}}"),),
            stack=True,
        ),
        Panel(
            "KV use by pod",
            "Share of a verifier's pages in use.",
            "percentunit",
            (
                Query(
                    f"{gauge(_PAGES, 'pod', _USED)} / {gauge(_PAGES, 'pod')}",
                    "{{pod}}",
                ),
            ),
        ),
        Panel(
            "Evictions",
            "Idle sessions whose KV was freed: their time was up, or a request needed the room.",
            "ops",
            (Query(per_second("treecast_verifier_evicted_sessions_total", "why"), "{{why}}"),),
        ),
        Panel(
            "Requests and sessions in verifiers",
            "Requests in the next step, paused, not begun; idle sessions with KV pages.",
            "short",
            (
                Query(gauge("treecast_verifier_running_requests", ""), "running"),
                Query(gauge("treecast_verifier_paused_requests", ""), "paused"),
                Query(gauge("treecast_verifier_waiting_requests", ""), "waiting"),
                Query(gauge("treecast_verifier_retained_sessions", ""), "idle sessions"),
            ),
        ),
        Panel(
            "Preemptions",
            "Running requests that were paused: KV pages ran out (memory; a larger pool or fewer "
            "slots help), or others went first (length).",
            "ops",
            (Query(per_second("treecast_verifier_preemptions_total", "why"), "{{why}}"),),
        ),
        Panel(
            "Swapped KV",
            "Host memory that paused requests take now, and what moves to it and back per second.",
            "bytes",
            (
                Query(gauge("treecast_verifier_swapped_bytes", ""), "held"),
                Query(
                    per_second("treecast_verifier_swap_bytes_total", "direction"),
                    "{{direction}} per second",
                ),
            ),
        ),
        Panel(
            "Wait for KV pages",
            "From a request's arrival at a verifier to its admission to the batch.",
            "s",
            quantiles("treecast_verifier_wait_seconds"),
        ),
        Heatmap(
            "Wait for KV pages, distribution",
            "Above the bottom: requests that waited for others to end, or for a sibling's prompt.",
            "s",
            buckets("treecast_verifier_wait_seconds"),
        ),
    ),
)

_STEPS = Row(
    "Steps",
    (
        Panel(
            "Step time by phase",
            "Means. Collect is the wait for trees. Forward should be most.",
            "s",
            (Query(mean(_PHASE, "phase"), "{{phase}}"),),
            stack=True,
        ),
        Heatmap(
            "Forward pass, distribution",
            "Bands are batch sizes; long ones are prompts.",
            "s",
            buckets(_PHASE, f'{POD},phase="forward"'),
        ),
        Heatmap(
            "Batch size, distribution",
            "Requests in a step.",
            "short",
            buckets("treecast_verifier_batch_requests"),
        ),
        Heatmap(
            "Batch rows, distribution",
            "Rows in a step: prompt chunks, roots and tree nodes.",
            "short",
            buckets("treecast_verifier_batch_rows"),
        ),
        Panel(
            "Tokens computed",
            "Prompt tokens computed, and output tokens committed, per second.",
            "ops",
            (
                Query(per_second("treecast_verifier_prefill_tokens_total"), "prompt"),
                Query(per_second("treecast_verifier_tokens_total"), "output"),
            ),
        ),
        Panel(
            "Output by tenant",
            "Whom the capacity goes to: tokens per second.",
            "ops",
            (Query(per_second("treecast_router_tokens_total", "tenant", CALLER), "{{tenant}}"),),
            stack=True,
        ),
    ),
)

_AROUND = Row(
    "Devices, Redis, placement",
    (
        Panel(
            "Device memory",
            "GPUs: allocated and reserved by the process, free and total of the device. cpu: what "
            "the process holds. The machine's total is left out.",
            "bytes",
            (
                Query(
                    gauge(
                        "treecast_device_memory_bytes",
                        "pod, device, state",
                        f'{POD},state!="total"',
                    ),
                    "{{pod}} {{device}} {{state}}",
                ),
            ),
        ),
        Panel(
            "Redis latency",
            "From a command to its answer, or to giving it up.",
            "s",
            (
                Query(quantile(0.5, _REDIS), "p50"),
                Query(quantile(0.99, _REDIS), "p99"),
            ),
        ),
        Heatmap("Redis latency, distribution", "All services' commands.", "s", buckets(_REDIS)),
        Panel(
            "Placements",
            "What decided where requests went: the session's lease, a prefix, a hash, or load.",
            "ops",
            (Query(per_second(_PLACED, "by"), "{{by}}"),),
            stack=True,
        ),
        Panel(
            "Affinity hits",
            "Share of placements that went where the session's KV cache is.",
            "percentunit",
            (
                Query(
                    f"{per_second(_PLACED, where=_BY_AFFINITY)} / {per_second(_PLACED)}",
                    "affinity",
                ),
            ),
        ),
        Panel(
            "Streams and drains",
            "Verifiers that each router is connected to; processes that are draining.",
            "short",
            (
                Query(gauge("treecast_router_verifier_streams", "pod"), "verifiers of {{pod}}"),
                Query(gauge("treecast_draining", ""), "draining"),
            ),
        ),
    ),
)

CAPACITY = Dashboard(
    "treecast-capacity",
    "treecast / Capacity",
    "KV cache, steps, devices, Redis and placement.",
    (MODEL_VARIABLE, TENANT_VARIABLE, POD_VARIABLE),
    (_KV, _STEPS, _AROUND),
)
