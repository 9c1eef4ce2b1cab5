"""Dashboard *Speculation*: what trees give, who is right, what is waited for, what is planned."""

from __future__ import annotations

from .panels import Dashboard, Heatmap, Panel, Query, Row
from .promql import (
    MODEL_VARIABLE,
    POD_VARIABLE,
    buckets,
    gauge,
    mean,
    per_second,
    quantile,
    quantiles,
    share,
)

_NODES = "treecast_verifier_tree_nodes"
_PLAN = "treecast_verifier_plan"

_GAIN = Row(
    "What speculation gives",
    (
        Panel(
            "Tokens per step",
            "Output tokens that one request gets of one pass of the model. 1 is plain decoding.",
            "short",
            (Query(mean("treecast_verifier_step_tokens", "pod"), "{{pod}}"),),
        ),
        Heatmap(
            "Tokens per step, distribution",
            "How many tokens the steps brought. A bright row at 1 with another far above it: some "
            "texts are foreseen and others are not.",
            "short",
            buckets("treecast_verifier_step_tokens"),
        ),
        Panel(
            "Acceptance rate",
            "Accepted share of the tree nodes that were verified. Wide trees have a low one: what "
            "counts is tokens per step.",
            "percentunit",
            (
                Query(
                    share(f"{_NODES}_accepted_total", f"{_NODES}_verified_total", "pod"), "{{pod}}"
                ),
            ),
        ),
        Panel(
            "Tree nodes",
            "Nodes that came from speculators, that a step computed, and that were accepted.",
            "ops",
            tuple(
                Query(per_second(f"{_NODES}_{name}_total"), name)
                for name in ("offered", "verified", "accepted")
            ),
        ),
    ),
)

_WHO_IS_RIGHT = Row(
    "Who is right, how deep",
    (
        Panel(
            "Acceptance by depth",
            "Of the verified trees that reached a depth, the share accepted that far.",
            "percentunit",
            (
                Query(
                    share(
                        "treecast_verifier_accepted_by_depth_total",
                        "treecast_verifier_offered_by_depth_total",
                        "depth",
                    ),
                    "{{depth}}",
                ),
            ),
        ),
        Panel(
            "Acceptance by proposer",
            "Accepted share of each drafter's verified nodes; a node counts for all who agreed.",
            "percentunit",
            (
                Query(
                    share(
                        "treecast_verifier_accepted_by_proposer_total",
                        "treecast_verifier_verified_by_proposer_total",
                        "proposer",
                    ),
                    "{{proposer}}",
                ),
            ),
        ),
        Panel(
            "Calibration",
            "Accepted nodes for each that the calibrated confidence promised, by confidence. 1 is "
            "right; above, drafters are better than believed; below, worse.",
            "short",
            (
                Query(
                    share(
                        "treecast_verifier_accepted_by_confidence_total",
                        "treecast_verifier_predicted_by_confidence_total",
                        "confidence",
                    ),
                    "{{confidence}}",
                ),
            ),
        ),
    ),
)

_DRAFTING = Row(
    "Drafting, and waiting for it",
    (
        Panel(
            "Draft wait",
            "Time that a step waited for trees it was owed.",
            "s",
            quantiles("treecast_verifier_draft_wait_seconds"),
        ),
        Heatmap(
            "Draft wait, distribution",
            "A bright row at 0: trees are there in time, or not worth waiting for.",
            "s",
            buckets("treecast_verifier_draft_wait_seconds"),
        ),
        Panel(
            "Draft time, p95",
            "Of one draft for all sessions that want one, by drafter.",
            "s",
            (Query(quantile(0.95, "treecast_speculator_draft_seconds", "drafter"), "{{drafter}}"),),
        ),
        Panel(
            "Run-ahead",
            "Re-rooted: older trees that were of use to a verifier after a commit. Hit and miss: "
            "commits that a speculator with a device of its own had or had not foreseen.",
            "ops",
            (
                Query(per_second("treecast_verifier_run_ahead_hits_total"), "re-rooted"),
                Query(per_second("treecast_speculator_run_ahead_total", "outcome"), "{{outcome}}"),
            ),
        ),
        Panel(
            "Frames",
            "Trees that came to verifiers; those for text that was not committed; malformed ones.",
            "ops",
            (
                Query(per_second("treecast_verifier_trees_total"), "trees"),
                Query(per_second("treecast_verifier_stale_frames_total"), "stale"),
                Query(per_second("treecast_verifier_bad_frames_total"), "bad"),
            ),
        ),
        Panel(
            "Speculators and their sessions",
            "Streams that each verifier has to speculators; sessions that each speculator drafts.",
            "short",
            (
                Query(gauge("treecast_verifier_speculators", "pod"), "speculators of {{pod}}"),
                Query(gauge("treecast_speculator_sessions", "pod"), "sessions of {{pod}}"),
            ),
        ),
    ),
)

_GOODPUT = Row(
    "Goodput plan",
    (
        Panel(
            "Nodes granted",
            "Nodes that steps could have computed, and those that the plan found worth their time.",
            "ops",
            (
                Query(per_second(f"{_PLAN}_nodes_at_hand_total"), "at hand"),
                Query(per_second(f"{_PLAN}_nodes_granted_total"), "granted"),
            ),
        ),
        Panel(
            "Predicted gain",
            "Tokens that the plan expected of the nodes it granted, and those that were accepted. "
            "They agree where confidence is calibrated.",
            "ops",
            (
                Query(per_second(f"{_PLAN}_predicted_tokens_total"), "predicted"),
                Query(per_second(f"{_NODES}_accepted_total"), "accepted"),
            ),
        ),
        Panel(
            "Price of a second",
            "Tokens that one request gets of a second: a node or a wait has to add more than that.",
            "short",
            (Query(gauge("treecast_verifier_goodput_tokens_per_second", "pod"), "{{pod}}"),),
        ),
    ),
)

SPECULATION = Dashboard(
    "treecast-speculation",
    "treecast / Speculation",
    "What trees give, who is right, what is waited for and what is planned.",
    (MODEL_VARIABLE, POD_VARIABLE),
    (_GAIN, _WHO_IS_RIGHT, _DRAFTING, _GOODPUT),
)
