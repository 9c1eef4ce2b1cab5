"""What a dashboard consists of; `grafana.py` writes it down, `draw.py` draws its data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Unit = Literal["s", "percentunit", "short", "bytes", "reqps", "ops"]
"""Grafana's names."""


@dataclass(frozen=True, slots=True)
class Query:
    """One expression; each series that it returns is named by `legend`, {{label}} filled in."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """Lines over time.

    Attributes:
        help: what is seen, and what is good or bad.
        stack: lay the lines on one another, where they are parts of a whole.
    """

    title: str
    help: str
    unit: Unit
    queries: tuple[Query, ...]
    stack: bool = False


@dataclass(frozen=True, slots=True)
class Heatmap:
    """A distribution over time: `query` returns a histogram's buckets, by `le`."""

    title: str
    help: str
    unit: Unit
    query: Query

    @property
    def queries(self) -> tuple[Query, ...]:
        return (self.query,)


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under one title; `abreast` of them beside one another."""

    title: str
    panels: tuple[Panel | Heatmap, ...]

    @property
    def abreast(self) -> int:
        """Three, or four where that fills the line."""
        return 4 if len(self.panels) == 4 else 3


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice at the top of a dashboard: the values of `label` among the series of `selector`."""

    name: str
    selector: str
    label: str


@dataclass(frozen=True, slots=True)
class Dashboard:
    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]

    @property
    def panels(self) -> Iterator[Panel | Heatmap]:
        return (panel for row in self.rows for panel in row.panels)
