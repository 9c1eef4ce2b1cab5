"""The bench of running ahead, on meshes of real processes with the toy engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from treecast.bench.chaos.load import toy_works
from treecast.bench.overlap import WAYS, Terms, compare, overlap_settings
from treecast.services.local import MeshSettings


@pytest.mark.slow
async def test_text_is_the_same_and_commits_are_foreseen_when_a_draft_runs_ahead(
    tmp_path: Path,
) -> None:
    mesh = MeshSettings(
        engine="toy",
        planner="full",
        torch_threads=1,
        verifier_flags={"max_nodes": 64},
        speculator_flags={"toy_step_s": 0.002},
    )
    settings = [overlap_settings(mesh, tmp_path, 0.02, way) for way in WAYS]
    found = await compare(settings, toy_works(4, 40), Terms(num_nodes=64, rounds=1))
    asked, ahead = found.standings
    assert found.same
    assert asked.hit_rate is None
    assert ahead.hit_rate is not None
    assert ahead.hit_rate > 0.5
    for standing in found.standings:
        assert standing.tokens_per_step > 2
        assert standing.nodes.median > 50
        assert 0 < standing.wire_bytes.median < 600
