"""What the dashboards' code generates, and the alert rules' own tests."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from treecast.dashboards.alerts import ALERTS, rules
from treecast.dashboards.debian import Binaries, PrometheusMissing, find_prometheus
from treecast.dashboards.generated import DASHBOARDS, ROOT, generated_files
from treecast.dashboards.grafana import dashboard_json

from .. import dashboard_contract as contract

CASES = Path(__file__).parents[1] / "alert_cases.yaml"


def test_the_committed_files_are_what_the_code_generates() -> None:
    stale = [path for path, text in generated_files().items() if (ROOT / path).read_text() != text]
    assert not stale, "run `make dashboards`"
    folder = ROOT / "deploy/k8s/treecast/files"
    present = {path.relative_to(ROOT) for path in folder.glob("*/*") if path.is_file()}
    made = {path for path in generated_files() if path.suffix in (".json", ".yaml")}
    of_ours = {path for path in present if path.parent.name in ("dashboards", "alerts")}
    assert of_ours == made


def test_every_metric_that_an_expression_names_is_declared() -> None:
    declared = contract.declared_series()
    for one in (*contract.expressions(DASHBOARDS, "1m"), *contract.alert_expressions()):
        assert contract.metric_names(one.expr), one
        assert not contract.unknown(one, declared), one


def test_metric_names_are_found_when_an_expression_has_every_kind_of_clause() -> None:
    expr = (
        'sum by (pod, le) (rate(a_total{x="b{c}",y=~".*"}[5m] offset 1h)) / on (pod) group_left '
        "(model) max without (z) (d_bytes) > bool 1e3 or histogram_quantile(0.5, e:f_bucket) and up"
    )
    assert contract.metric_names(expr) == {"a_total", "d_bytes", "e:f_bucket", "up"}


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda one: one.uid)
def test_a_dashboard_uses_its_variables_and_no_others(dashboard: Any) -> None:
    whole = json.dumps(dashboard_json(dashboard))
    chosen = {variable.name for variable in dashboard.variables}
    assert set(re.findall(r"\$(\w+)", whole)) == chosen | {"__all", "__rate_interval"}
    asked = " ".join(query.expr for panel in dashboard.panels for query in panel.queries)
    chained = " ".join(variable.selector for variable in dashboard.variables)
    assert all(f"${name}" in asked + chained for name in chosen)


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda one: one.uid)
def test_panels_do_not_overlap_and_have_names_of_their_own(dashboard: Any) -> None:
    panels = dashboard_json(dashboard)["panels"]
    covered: set[tuple[int, int]] = set()
    for panel in panels:
        x, y, w, h = (panel["gridPos"][side] for side in "xywh")
        cells = {(x + i, y + j) for i in range(w) for j in range(h)}
        assert x + w <= 24
        assert not cells & covered
        covered |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)


def test_every_alert_has_cases_that_fire_it_and_that_leave_it_quiet() -> None:
    checks = [check for case in cases()["tests"] for check in case["alert_rule_test"]]
    for wanted in (True, False):
        tried = {one["alertname"] for one in checks if bool(one.get("exp_alerts")) is wanted}
        noisy_beside_quiet = {"TreecastQueueWait", "TreecastStaleFrames"}
        assert tried | (set() if wanted else noisy_beside_quiet) == {one.name for one in ALERTS}


def test_alerts_fire_and_stay_quiet_as_their_cases_say(tmp_path: Path, binaries: Binaries) -> None:
    tested = promtool(tmp_path, binaries, rules())
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["vector(1) > 2", "vector(1)"], ids=["never", "always"])
def test_every_alert_fails_its_cases_when_it_fires_never_or_always(
    broken: str, tmp_path: Path, binaries: Binaries
) -> None:
    changed: Any = rules()
    for rule in changed["groups"][0]["rules"]:
        rule["expr"] = broken
    tested = promtool(tmp_path, binaries, changed)
    assert tested.returncode != 0
    failed = set(re.findall(r"alertname: (\w+)", tested.stdout + tested.stderr))
    assert failed == {alert.name for alert in ALERTS}


@pytest.mark.slow
def test_prometheus_is_unpacked_once_when_it_is_not_on_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, binaries: Binaries
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("apt-get", "dpkg-deb", "dpkg", "tar", "sh", "gpgv", "rm", "xz"):
        if found := shutil.which(name):
            (programs / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(programs))
    with ThreadPoolExecutor(2) as both:
        one, other = both.map(find_prometheus, [tmp_path / "cache"] * 2)
    assert one == other
    for program in (one.prometheus, one.promtool):
        assert program.startswith(str(tmp_path))
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        assert "version" in said.stdout + said.stderr


def test_a_missing_prometheus_is_named_when_it_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PrometheusMissing, match="not on PATH, and this is no Debian"):
        find_prometheus(tmp_path / "cache")


def cases() -> Any:
    return yaml.safe_load(CASES.read_text())


def promtool(
    folder: Path, binaries: Binaries, alert_rules: object
) -> subprocess.CompletedProcess[str]:
    """Run the cases; annotations that a case leaves open are those of the alert."""
    texts = {alert.name: alert for alert in ALERTS}
    document = cases() | {"rule_files": ["rules.yaml"]}
    for case in document["tests"]:
        for check in case["alert_rule_test"]:
            alert = texts[check["alertname"]]
            for expected in check.get("exp_alerts", ()):
                said = {"description": alert.meaning, "action": alert.action}
                expected["exp_annotations"] = expected["exp_annotations"] | said
    (folder / "rules.yaml").write_text(yaml.safe_dump(alert_rules))
    (folder / "cases.yaml").write_text(yaml.safe_dump(document))
    return subprocess.run(
        [binaries.promtool, "test", "rules", "cases.yaml"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
