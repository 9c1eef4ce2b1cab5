"""What Prometheus says of every panel over one time span; can be kept as a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .panels import Dashboard, Query
from .prometheus import Prometheus, Series
from .promql import expand


@dataclass(frozen=True, slots=True)
class Recording:
    """Answers by expression as the dashboards have it, from `start_s` to `end_s`."""

    start_s: float
    end_s: float
    answers: dict[str, list[Series]]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Recording:
        said = json.loads(path.read_text())
        answers = {
            expr: [Series(one["labels"], tuple(one["times"]), tuple(one["values"])) for one in many]
            for expr, many in said["answers"].items()
        }
        return cls(said["start_s"], said["end_s"], answers)


def record(
    prometheus: Prometheus,
    dashboards: Sequence[Dashboard],
    start_s: float,
    end_s: float,
    window: str,
    num_points: int = 120,
) -> Recording:
    """Ask for every panel's data.

    Raises:
        PrometheusError: an expression is refused.
    """
    queries: list[Query] = [
        query for each in dashboards for panel in each.panels for query in panel.queries
    ]
    step_s = (end_s - start_s) / num_points
    answers = {
        query.expr: prometheus.range(expand(query.expr, window), start_s, end_s, step_s)
        for query in queries
    }
    return Recording(start_s, end_s, answers)
