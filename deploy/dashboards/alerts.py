"""The alerts: when they fire, and what whoever is called should do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_WHO = "namespace, pod"

OBJECTIVE = 0.999
"""Share of requests that must not fail through our fault."""

_OUR_FAULT = "internal|unavailable|overloaded|deadline_exceeded|invalid_frame|stale_lease"


@dataclass(frozen=True, slots=True)
class Alert:
    """One rule.

    Attributes:
        lasting: for how long the expression must hold.
        summary: one line; may name the labels of what fired.
        meaning: what it says about the service.
        action: what to do.
    """

    name: str
    expr: str
    lasting: str
    severity: Literal["critical", "warning"]
    summary: str
    meaning: str
    action: str


def _rate(metric: str, window: str, by: str = _WHO, where: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{{{where}}}[{window}]))"


def _failing(window: str) -> str:
    requests = "treecast_router_requests_total"
    failed = _rate(requests, window, "namespace", f'outcome=~"{_OUR_FAULT}"')
    return f"{failed} / {_rate(requests, window, 'namespace')}"


def _burn(factor: float, long: str, short: str) -> str:
    """Two windows: the long one says that it matters, the short one that it still goes on.

    Source: The Site Reliability Workbook (O'Reilly 2018), chapter 5.
    """
    bound = f"{factor * (1 - OBJECTIVE):.4g}"
    return f"({_failing(long)}) > {bound} and ({_failing(short)}) > {bound}"


_TREES_AT_DEPTH_1 = _rate("treecast_verifier_offered_by_depth_total", "10m", where='depth="1"')
_ACCEPTED_AT_DEPTH_1 = _rate("treecast_verifier_accepted_by_depth_total", "10m", where='depth="1"')
_TREES = _rate("treecast_verifier_trees_total", "10m")
_QUEUE_WAIT = _rate("treecast_router_queue_wait_seconds_bucket", "5m", f"{_WHO}, le")

ALERTS = (
    Alert(
        "TreecastNoVerifier",
        f"max by ({_WHO}) (treecast_router_verifier_streams{{}}) == 0",
        "1m",
        "critical",
        "Router {{ $labels.pod }} has no verifier",
        "The router reaches no verifier, so every request to it waits for the grace period and "
        "then fails with UNAVAILABLE.",
        "Look whether verifiers run and are ready, and at their last log lines. If they do run: "
        "are they in Redis or among --verifiers, and does a network policy or a certificate keep "
        "the router from them (`stream refused` in its log)?",
    ),
    Alert(
        "TreecastAcceptanceCollapse",
        f"{_ACCEPTED_AT_DEPTH_1} / {_TREES_AT_DEPTH_1} < 0.1 and {_TREES_AT_DEPTH_1} > 0.02",
        "10m",
        "warning",
        "Verifier {{ $labels.pod }} accepts fewer than one tree in ten",
        "Nine of ten verified trees miss with their first token. Output is right, as ever, but "
        "drafting is for nothing.",
        "Look at acceptance by proposer. One proposer low: has its draft, or the target, been "
        "replaced without the other? All low: text of another kind or temperature than the drafts "
        "were tuned for; tune them on it (`treecast tune`).",
    ),
    Alert(
        "TreecastQueueWait",
        f"histogram_quantile(0.95, {_QUEUE_WAIT}) > 5 or (max by ({_WHO}) "
        "(treecast_router_queue_requests{}) > 0 unless "
        f"{_rate('treecast_router_queue_wait_seconds_count', '5m')} > 0)",
        "5m",
        "warning",
        "Requests wait in the queue of {{ $labels.pod }} for more than 5 s",
        "One request in twenty waits more than 5 s for a verifier, or requests wait and none is "
        "placed.",
        "Add verifiers. If their batches are not full, look at KV pages and --max-running. Who "
        "sends the traffic is on the dashboard Latency and traffic.",
    ),
    Alert(
        "TreecastKVPressure",
        f"max by ({_WHO}) (treecast_verifier_waiting_requests{{}} + "
        "treecast_verifier_paused_requests{}) > 0 and "
        f'sum by ({_WHO}) (treecast_verifier_kv_pages{{state="free"}}) / '
        f"sum by ({_WHO}) (treecast_verifier_kv_pages{{}}) < 0.2",
        "5m",
        "warning",
        "Requests wait for KV pages of {{ $labels.pod }}",
        "For minutes requests have waited at a verifier, not begun or paused, and pages are few.",
        "Raise --pool-tokens if the device has memory left, add verifiers, or lower "
        "--session-ttl-s if idle sessions hold the pages.",
    ),
    Alert(
        "TreecastStaleFrames",
        f"{_rate('treecast_verifier_stale_frames_total', '10m')} / {_TREES} > 0.5 and "
        f"{_TREES} > 0.02",
        "10m",
        "warning",
        "Every second tree that reaches {{ $labels.pod }} is too late or off the text",
        "Speculators guess for text that the verifier did not commit, or for requests that have "
        "ended.",
        "Speculators are too slow for this verifier: look at draft time, give them a faster device "
        "or fewer sessions (--capacity).",
    ),
    Alert(
        "TreecastRedisDown",
        f"min by ({_WHO}) (treecast_redis_up{{}}) == 0",
        "1m",
        "warning",
        "Redis does not answer {{ $labels.pod }}",
        "Requests are served, sessions are placed by hash, and new pods are found by --verifiers "
        "and --speculators only.",
        "Bring Redis back; nothing else is needed. While it is away do not scale verifiers: that "
        "moves sessions, and their prompts are computed anew.",
    ),
    Alert(
        "TreecastDrainStuck",
        f"max by ({_WHO}) (treecast_draining{{}}) == 1",
        "10m",
        "warning",
        "{{ $labels.pod }} has been draining for 10 minutes",
        "A process that is to stop still has requests or sessions.",
        "See how many on the dashboards. If they are long requests, wait: --drain-s ends it. If it "
        "is past that, the process hangs: keep its log, then delete the pod; its requests go on "
        "elsewhere.",
    ),
    Alert(
        "TreecastErrorBudgetBurnFast",
        _burn(14.4, "1h", "5m"),
        "2m",
        "critical",
        "Requests fail so fast that the month's error budget is gone in two days",
        f"The objective is {OBJECTIVE:.1%} of requests without a failure of ours; failures come "
        "14 times as fast as that allows.",
        "Look at requests by outcome. unavailable: verifiers are missing or die; overloaded: the "
        "queue is full; deadline_exceeded: requests wait too long; internal: read the logs.",
    ),
    Alert(
        "TreecastErrorBudgetBurnSlow",
        _burn(6, "6h", "30m"),
        "15m",
        "warning",
        "Requests fail so fast that the month's error budget is gone in five days",
        f"The same objective of {OBJECTIVE:.1%}; failures come 6 times as fast as that allows.",
        "As for the fast burn, but there is time until the next working day.",
    ),
)


def rules() -> dict[str, object]:
    """A Prometheus rules file, which is also the `spec` of a PrometheusRule."""
    return {"groups": [{"name": "treecast", "rules": [_rule(alert) for alert in ALERTS]}]}


def _rule(alert: Alert) -> dict[str, object]:
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": alert.lasting,
        "labels": {"severity": alert.severity},
        "annotations": {
            "summary": alert.summary,
            "description": alert.meaning,
            "action": alert.action,
        },
    }
