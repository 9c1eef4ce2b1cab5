"""Dashboards and alerts are files that somebody generates: all are taken in, and none is needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from .helm import CHART, Manifest, Values, render

ON = {f"metrics.{kind}.enabled": "true" for kind in ("monitors", "dashboards", "alerts")}
LIMIT_BYTES = 1024 * 1024
"""Of a ConfigMap, to be sent to the API."""

RULES = """
groups:
  - name: one
    rules:
      - alert: NoVerifier
        expr: treecast_router_verifier_streams == 0
        annotations: {summary: "{{ $labels.pod }} has {{ $value }}"}
"""


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


@pytest.fixture
def chart(tmp_path: Path) -> Path:
    copy = tmp_path / "treecast"
    shutil.copytree(CHART, copy, ignore=shutil.ignore_patterns("files"))
    return copy


@pytest.mark.slow
def test_neither_is_rendered_when_there_are_no_files(chart: Path) -> None:
    manifests = render(Values(sets=ON), chart)
    assert of_kind(manifests, "ServiceMonitor")
    assert not of_kind(manifests, "ConfigMap") + of_kind(manifests, "PrometheusRule")


@pytest.mark.slow
def test_files_are_taken_as_they_are_when_there_are_some(chart: Path) -> None:
    board = {"title": "Speculation", "panels": [{"legendFormat": "{{pod}}"}]}
    for folder in ("dashboards", "alerts"):
        (chart / "files" / folder).mkdir(parents=True)
    (chart / "files/dashboards/speculation.json").write_text(json.dumps(board, indent=2))
    (chart / "files/alerts/a.yaml").write_text(RULES)
    (chart / "files/alerts/b.yaml").write_text(RULES.replace("one", "two"))
    manifests = render(Values(sets=ON), chart)
    (shown,) = of_kind(manifests, "ConfigMap")
    assert shown["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(shown["data"]["treecast-speculation.json"]) == board
    (rule,) = of_kind(manifests, "PrometheusRule")
    assert [group["name"] for group in rule["spec"]["groups"]] == ["one", "two"]
    assert rule["spec"]["groups"][0] == yaml.safe_load(RULES)["groups"][0]


@pytest.mark.slow
def test_every_file_of_the_chart_is_taken_in_when_all_is_on() -> None:
    manifests = render(Values(sets=ON))
    maps = of_kind(manifests, "ConfigMap")
    assert len(maps) == len(list((CHART / "files" / "dashboards").glob("*.json")))
    groups = [g for rule in of_kind(manifests, "PrometheusRule") for g in rule["spec"]["groups"]]
    files = (CHART / "files" / "alerts").glob("*.yaml")
    assert groups == [
        g for file in sorted(files) for g in yaml.safe_load(file.read_text())["groups"]
    ]
    for manifest in maps:
        assert len(json.dumps(manifest)) < LIMIT_BYTES
