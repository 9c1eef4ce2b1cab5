"""What a speculator measures of itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from treecast.engine.base import ModelInfo

_DRAFT_BUCKETS_S = (
    0.0001, 0.0003, 0.001, 0.002, 0.004, 0.006, 0.008, 0.012, 0.016, 0.024, 0.05, 0.1, 0.3, 1.0,
)  # fmt: skip


class SpeculatorMetrics:
    """Prometheus metrics of one speculator; seconds and counts, labels bounded."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.sessions = Gauge(
            "treecast_speculator_sessions", "Sessions attached now.", registry=registry
        )
        self.trees = Counter(
            "treecast_speculator_trees_total",
            "Trees sent; an empty one says that there is no guess.",
            registry=registry,
        )
        self.nodes = Counter(
            "treecast_speculator_nodes_total", "Nodes of the trees sent.", registry=registry
        )
        self.draft = Histogram(
            "treecast_speculator_draft_seconds",
            "Time of one draft, batched over sessions, by drafter.",
            ["drafter"],
            buckets=_DRAFT_BUCKETS_S,
            registry=registry,
        )
        self.resyncs = Counter(
            "treecast_speculator_resyncs_total",
            "Gaps seen in a session's commits; each asks the verifier to attach anew.",
            registry=registry,
        )
        self.refused = Counter(
            "treecast_speculator_refused_total",
            "Sessions refused or given up, by the error's reason.",
            ["reason"],
            registry=registry,
        )
        self.unknown_frames = Counter(
            "treecast_speculator_unknown_frames_total",
            "Frames for sessions that are not attached; ignored.",
            registry=registry,
        )
        self.run_ahead = Counter(
            "treecast_speculator_run_ahead_total",
            "Commits by whether their last token was computed before it was committed: hit, miss.",
            ["outcome"],
            registry=registry,
        )
        self.draft_models = Gauge(
            "treecast_speculator_draft_model_info",
            "1 for the revision that each drafter's new sessions are opened in.",
            ["drafter", "model", "revision"],
            registry=registry,
        )
        self.swaps = Counter(
            "treecast_speculator_swaps_total",
            "Drafts loaded to take over from one that served, by how it ended: done, failed.",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("done", "failed"):
            self.swaps.labels(outcome)
        for outcome in ("hit", "miss"):
            self.run_ahead.labels(outcome)
        self._shown: dict[str, tuple[str, str, str]] = {}

    def show_draft(self, drafter: str, info: ModelInfo) -> None:
        """A drafter has this model now, and none of those before."""
        if (old := self._shown.get(drafter)) is not None:
            self.draft_models.remove(*old)
        self._shown[drafter] = (drafter, info.name, info.revision)
        self.draft_models.labels(*self._shown[drafter]).set(1)
