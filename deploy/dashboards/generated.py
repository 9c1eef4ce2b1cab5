"""The files that the chart mounts, and the tables of docs/observability.md, as text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from .alerts import ALERTS, rules
from .capacity import CAPACITY
from .catalogue import catalogue
from .grafana import dashboard_json
from .latency import LATENCY
from .speculation import SPECULATION

DASHBOARDS = (SPECULATION, LATENCY, CAPACITY)
ROOT = Path(__file__).resolve().parents[2]

_CHART_FILES = Path("deploy/k8s/treecast/files")
_DOCS = Path("docs/observability.md")
_MADE = "made by `python -m treecast.dashboards`"
_WHOSE = {
    "all": "Every service",
    "router": "Router",
    "verifier": "Verifier",
    "speculator": "Speculator",
}


def generated_files(root: Path = ROOT) -> dict[Path, str]:
    """Text of each generated file by its path below `root`, where the docs' own text is read."""
    files = {_CHART_FILES / "alerts" / "treecast.yaml": alerts_text()}
    for dashboard in DASHBOARDS:
        name = dashboard.uid.removeprefix("treecast-")
        text = json.dumps(dashboard_json(dashboard), indent=2) + "\n"
        files[_CHART_FILES / "dashboards" / f"{name}.json"] = text
    files[_DOCS] = _filled((root / _DOCS).read_text())
    return files


def alerts_text() -> str:
    """The rules file."""
    return f"# {_MADE.capitalize()}.\n" + yaml.safe_dump(rules(), sort_keys=False, width=100)


def _filled(document: str) -> str:
    """The document with its generated parts anew; each lies between two comments."""
    parts = {"dashboards": _dashboards(), "alerts": _alerts(), "metrics": _metrics()}
    for name, text in parts.items():
        begin, end = f"<!-- {name}: {_MADE} -->", f"<!-- end of {name} -->"
        pattern = re.escape(begin) + r".*?" + re.escape(end)
        whole = f"{begin}\n\n{text}\n\n{end}"
        found = re.search(pattern, document, flags=re.DOTALL)
        assert found, f"{_DOCS} has no part {name!r}"
        document = document[: found.start()] + whole + document[found.end() :]
    return document


def _dashboards() -> str:
    lines = []
    for dashboard in DASHBOARDS:
        lines += [f"**{dashboard.title.removeprefix('treecast / ')}**", ""]
        lines += ["| panel | what it shows |", "|---|---|"]
        lines += [f"| {panel.title} | {panel.help} |" for panel in dashboard.panels]
        lines.append("")
    return "\n".join(lines).strip()


def _alerts() -> str:
    return "\n\n".join(
        f"**{alert.name}** ({alert.severity}, after {alert.lasting}). {alert.meaning} *What to "
        f"do:* {alert.action}"
        for alert in ALERTS
    )


def _metrics() -> str:
    lines = []
    for who, metrics in catalogue().items():
        lines += [f"**{_WHOSE[who]}**", "", "| metric | kind | labels | |", "|---|---|---|---|"]
        lines += [
            f"| `{one.name}` | {one.kind} | {', '.join(one.labels)} | {one.help} |"
            for one in metrics
        ]
        lines.append("")
    return "\n".join(lines).strip()
