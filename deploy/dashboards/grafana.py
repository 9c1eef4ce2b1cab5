"""Dashboards as the JSON that Grafana imports (10 or newer).

Plain JSON rather than grafana-foundation-sdk: its releases follow Grafana's, a time stamp as their
epoch, none of them stable; and four kinds of objects do not need a builder for each of Grafana's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .panels import Dashboard, Heatmap, Panel, Query, Row, Variable

Json = dict[str, Any]
"""Any: whatever JSON holds."""

_COLUMNS = 24
_HEIGHT = 8
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard_json(dashboard: Dashboard) -> Json:
    """The whole dashboard."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["treecast"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [
            {
                "title": "treecast",
                "type": "dashboards",
                "tags": ["treecast"],
                "asDropdown": True,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "templating": {"list": [_source_choice(), *map(_choice, dashboard.variables)]},
        "panels": list(_lay_out(dashboard.rows)),
    }


def _source_choice() -> Json:
    return {
        "name": "datasource",
        "label": "data source",
        "type": "datasource",
        "query": "prometheus",
    }


def _choice(variable: Variable) -> Json:
    query = f"label_values({variable.selector}, {variable.label})"
    return {
        "name": variable.name,
        "label": variable.name,
        "type": "query",
        "datasource": _SOURCE,
        "definition": query,
        "query": {"query": query, "refId": variable.name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def _lay_out(rows: Sequence[Row]) -> Iterator[Json]:
    """Each row's panels under its title."""
    y = number = 0
    for row in rows:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": y, "w": _COLUMNS, "h": 1},
        }
        y += 1
        width = _COLUMNS // row.abreast
        for place, panel in enumerate(row.panels):
            number += 1
            x, down = place % row.abreast * width, place // row.abreast * _HEIGHT
            where = {"x": x, "y": y + down, "w": width, "h": _HEIGHT}
            yield {"id": number, "gridPos": where, **_panel(panel)}
        y += -(-len(row.panels) // row.abreast) * _HEIGHT


def _panel(panel: Panel | Heatmap) -> Json:
    kind = _heatmap(panel) if isinstance(panel, Heatmap) else _lines(panel)
    return {
        "title": panel.title,
        "description": panel.help,
        "datasource": _SOURCE,
        "targets": [
            _target(query, chr(ord("A") + place), isinstance(panel, Heatmap))
            for place, query in enumerate(panel.queries)
        ],
        **kind,
    }


def _target(query: Query, ref: str, heatmap: bool) -> Json:
    return {
        "refId": ref,
        "datasource": _SOURCE,
        "expr": query.expr,
        "legendFormat": query.legend or "__auto",
        "format": "heatmap" if heatmap else "time_series",
        "range": True,
    }


def _lines(panel: Panel) -> Json:
    stacking = {"mode": "normal" if panel.stack else "none", "group": "A"}
    custom = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 40 if panel.stack else 8,
        "showPoints": "never",
        "stacking": stacking,
    }
    return {
        "type": "timeseries",
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": custom},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


def _heatmap(panel: Heatmap) -> Json:
    return {
        "type": "heatmap",
        "fieldConfig": {"defaults": {}, "overrides": []},
        "options": {
            "calculate": False,
            "cellGap": 1,
            "color": {"mode": "scheme", "scheme": "Blues", "reverse": False, "steps": 64},
            "filterValues": {"le": 1e-9},
            "rowsFrame": {"layout": "auto"},
            "yAxis": {"axisPlacement": "left", "unit": panel.unit},
            "tooltip": {"show": True, "yHistogram": True},
            "legend": {"show": True},
        },
    }
