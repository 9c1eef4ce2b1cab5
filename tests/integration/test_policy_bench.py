"""The comparison of policies, on meshes of real processes with the toy engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from treecast.bench.policies import Terms, compare_policies
from treecast.client import SamplingParams
from treecast.services.local import MeshSettings


@pytest.mark.slow
def test_policies_give_plain_decodings_text_when_they_share_speculators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TREECAST_HOME", str(tmp_path))
    settings = MeshSettings(
        engine="toy",
        torch_threads=1,
        log_dir=tmp_path,
        verifier_flags={"toy_step_s": 0.01, "reassign_steps": 2},
        speculator_flags={"capacity": 2},
    )
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    terms = Terms(("default", "default", "ngram"), sampling, concurrency=3, rounds=1)
    prompts = {str(number): [number, 5, 6] for number in range(4)}
    standings = compare_policies(settings, terms, prompts)
    assert [s.contender for s in standings] == ["plain", "tree", "spin", "vote"]
    assert all(s.same_as_plain == 4 for s in standings)
    assert standings[0].tokens_per_step == 1
    assert all(s.tokens_per_step > 1 for s in standings[1:])
    assert any("vote_weight" in name for name in standings[3].metrics)
