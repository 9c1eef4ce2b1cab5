"""Pictures of dashboards, from data made by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image

from treecast.dashboards.draw import amount, draw, legend
from treecast.dashboards.generated import DASHBOARDS
from treecast.dashboards.panels import Dashboard, Heatmap, Query, Unit
from treecast.dashboards.prometheus import Series
from treecast.dashboards.recording import Recording

TIMES = (100.0, 101.0, 102.0)


def recording(dashboard: Dashboard) -> Recording:
    """Two series for each query, one of them without a number in it."""
    answers = {}
    for panel in dashboard.panels:
        labels = ({"le": "0.5"}, {"le": "+Inf"}) if isinstance(panel, Heatmap) else ({}, {"x": "y"})
        for query in panel.queries:
            answers[query.expr] = [
                Series(labels[0], TIMES, (0.0, 1.0, 2.0)),
                Series(labels[1], TIMES, (math.nan,) * 3),
            ]
    return Recording(99.0, 102.0, answers)


def test_a_recording_is_the_same_when_it_was_kept_as_a_file(tmp_path: Path) -> None:
    kept = recording(DASHBOARDS[0])
    kept.save(tmp_path / "data")
    assert repr(Recording.load(tmp_path / "data")) == repr(kept)


@pytest.mark.parametrize(
    "dashboard",
    [
        DASHBOARDS[1],
        *(pytest.param(one, marks=pytest.mark.slow) for one in (DASHBOARDS[0], DASHBOARDS[2])),
    ],
    ids=lambda one: one.uid,
)
def test_a_dashboard_is_drawn_when_some_series_have_no_numbers(
    dashboard: Dashboard, tmp_path: Path
) -> None:
    draw(dashboard, recording(dashboard), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width == 1350
        assert len(picture.convert("RGB").getcolors(10**6) or ()) > 20


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "s", "0"),
        (0.0025, "s", "2.5 ms"),
        (0.00025, "s", "250 µs"),
        (12.5, "s", "12.5 s"),
        (0.125, "percentunit", "12.5%"),
        (1500, "ops", "1.5k"),
        (0.25, "short", "0.25"),
        (3 * 2**20, "bytes", "3 MiB"),
    ],
)
def test_amounts_are_short(value: float, unit: Unit, text: str) -> None:
    assert amount(value, unit) == text


def test_a_legend_has_the_labels_filled_in() -> None:
    series = Series({"pod": "v", "why": "lost"}, (), ())
    assert legend(Query("up", "{{why}} of {{pod}}{{gone}}"), series) == "lost of v"
