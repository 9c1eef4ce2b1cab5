"""The few shapes of expression that the dashboards are made of.

`pod` is a scrape label, as every Kubernetes set-up attaches it. A verifier's and a speculator's
metrics carry no model: `treecast_model_info` says which pods belong to one, and the variable `pod`
offers only those of the chosen models. A router serves several models, so its metrics say which.
"""

from __future__ import annotations

import re

from .panels import Query, Variable

WINDOW = "$__rate_interval"
"""Grafana fills in a few scrape intervals, or more where a point of the plot covers more."""

POD = 'pod=~"$pod"'
CALLER = f'model=~"$model",tenant=~"$tenant",{POD}'

MODEL_VARIABLE = Variable("model", "treecast_model_info", "model")
POD_VARIABLE = Variable("pod", 'treecast_model_info{model=~"$model"}', "pod")
TENANT_VARIABLE = Variable("tenant", 'treecast_router_requests_total{model=~"$model"}', "tenant")


def expand(expr: str, window: str) -> str:
    """An expression as Grafana sends it with "All" chosen everywhere."""
    expr = expr.replace(WINDOW, window)
    return re.sub(r"\$(model|tenant|pod)\b", ".*", expr)


def per_second(metric: str, by: str = "", where: str = POD) -> str:
    """A counter's rate, summed over all but the labels `by`."""
    return f"sum by ({by}) (rate({metric}{{{where}}}[{WINDOW}]))"


def share(part: str, whole: str, by: str = "", where: str = POD) -> str:
    """What one counter grew by for each that another grew by."""
    return f"{per_second(part, by, where)} / {per_second(whole, by, where)}"


def mean(histogram: str, by: str = "", where: str = POD) -> str:
    """Mean of what a histogram observed lately."""
    return share(f"{histogram}_sum", f"{histogram}_count", by, where)


def quantile(q: float, histogram: str, by: str = "", where: str = POD) -> str:
    """A quantile of what a histogram observed lately."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {per_second(f'{histogram}_bucket', labels, where)})"


def quantiles(histogram: str, where: str = POD) -> tuple[Query, ...]:
    """The median and both tails that people ask for."""
    return tuple(
        Query(quantile(q, histogram, where=where), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99)
    )


def buckets(histogram: str, where: str = POD) -> Query:
    """What a heat map draws: how much fell up to each bound since the last point."""
    return Query(f"sum by (le) (increase({histogram}_bucket{{{where}}}[{WINDOW}]))", "{{le}}")


def gauge(metric: str, by: str, where: str = POD) -> str:
    """A gauge now, summed over all but the labels `by`."""
    return f"sum by ({by}) ({metric}{{{where}}})"
