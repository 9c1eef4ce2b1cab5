"""Holds every expression against a real Prometheus: it parses, its metrics exist, data comes."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from treecast.dashboards.alerts import ALERTS, Alert
from treecast.dashboards.catalogue import catalogue
from treecast.dashboards.panels import Dashboard, Query, Variable
from treecast.dashboards.prometheus import Prometheus, PrometheusError
from treecast.dashboards.promql import expand

_NOT_NAMES = re.compile(
    r"""
    "(?:[^"\\]|\\.)*"                                   # strings
    | \{[^}]*\} | \[[^\]]*\]                            # matchers, windows
    | \b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)
    | \b(?:and|or|unless|bool|offset|inf|nan)\b
    | \b\d[\w.]*                                        # numbers, durations
    | \b[a-z_][a-z0-9_]*(?=\s*\()                       # functions
    """,
    re.VERBOSE | re.IGNORECASE,
)
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_OF_A_HISTOGRAM = ("_bucket", "_count", "_sum")


@dataclass(frozen=True, slots=True)
class Expression:
    """One expression and whose it is."""

    where: str
    expr: str


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one expression.

    Attributes:
        num_series: series with at least one number in them.
        fault: empty if all is well.
    """

    expression: Expression
    num_series: int
    fault: str = ""


def metric_names(expr: str) -> set[str]:
    """Names of the metrics that an expression selects."""
    previous = ""
    while previous != expr:  # clauses such as `sum by (x) (...)` come apart from the outside in
        previous, expr = expr, _NOT_NAMES.sub(" ", expr)
    return set(_NAME.findall(expr))


def declared_series() -> frozenset[str]:
    """All names that an expression may use, `up` of Prometheus itself included."""
    names = {
        one.name + suffix
        for each in catalogue().values()
        for one in each
        for suffix in (_OF_A_HISTOGRAM if one.kind == "histogram" else ("",))
    }
    return frozenset(names | {"up"})


def expressions(dashboards: Iterable[Dashboard], window: str) -> Iterator[Expression]:
    """Those of all panels and variables."""
    for dashboard in dashboards:
        for variable in dashboard.variables:
            where = f"{dashboard.title} > variable {variable.name}"
            yield Expression(where, expand(_values(variable), window))
        for panel in dashboard.panels:
            for query in panel.queries:
                where = f"{dashboard.title} > {panel.title}{_of(query)}"
                yield Expression(where, expand(query.expr, window))


def alert_expressions(alerts: Iterable[Alert] = ALERTS) -> Iterator[Expression]:
    return (Expression(f"alert {alert.name}", alert.expr) for alert in alerts)


def check(expression: Expression, prometheus: Prometheus, start_s: float, end_s: float) -> Finding:
    """Ask for the whole time span; a series of nothing but NaN is no data."""
    fault = unknown(expression, prometheus.metric_names())
    try:
        step_s = max(1.0, (end_s - start_s) / 100)
        found = prometheus.range(expression.expr, start_s, end_s, step_s)
    except PrometheusError as error:
        return Finding(expression, 0, fault or error.message)
    count = sum(any(math.isfinite(value) for value in series.values) for series in found)
    return Finding(expression, count, fault or ("" if count else "no data"))


def check_quiet(expression: Expression, prometheus: Prometheus) -> Finding:
    """An alert's expression when nothing is wrong: it parses, and returns nothing."""
    fault = unknown(expression, prometheus.metric_names())
    try:
        count = len(prometheus.instant(expression.expr))
    except PrometheusError as error:
        return Finding(expression, 0, fault or error.message)
    return Finding(expression, count, fault or ("fires" if count else ""))


def alert_states(prometheus: Prometheus) -> dict[str, str]:
    """State of each alert of the rules file: inactive, pending or firing."""
    groups = prometheus._ask("rules")["groups"]
    return {rule["name"]: rule["state"] for group in groups for rule in group["rules"]}


def unknown(expression: Expression, existing: Collection[str]) -> str:
    """A fault that names the metrics which do not exist; empty if all do."""
    missing = sorted(metric_names(expression.expr) - set(existing))
    return f"no such metric: {', '.join(missing)}" if missing else ""


def _values(variable: Variable) -> str:
    return f"count by ({variable.label}) ({variable.selector})"


def _of(query: Query) -> str:
    return f" ({query.legend})" if query.legend else ""
