"""Each family of models: trees give transformers' greedy text, and plain decoding's sampled one."""

from __future__ import annotations

from pathlib import Path

import pytest

from treecast.bench.families.check import (
    Effort,
    Finding,
    check_family,
    check_folder,
    save_random_model,
)
from treecast.bench.families.configs import FAMILIES, QUICK, REFUSED
from treecast.bench.families.real import check_real
from treecast.engine import rerouting
from treecast.kernels.scores import PLAIN

QUICKLY = Effort(prompts=1, prompt_tokens=40, max_tokens=12)
PROMPT = range(3, 60)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2: of another family than nearly all that it drafts for."""
    folder = tmp_path_factory.mktemp("draft")
    save_random_model("gpt2", folder)
    return folder


def assert_good(found: Finding) -> None:
    assert found.is_good(REFUSED), found
    assert found.refusal or found.accepted > 0


@pytest.mark.parametrize("family", QUICK)
def test_trees_give_the_text_of_transformers(family: str, draft: Path) -> None:
    assert_good(check_family(family, draft, QUICKLY))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_trees_give_the_text_of_transformers_in_long(family: str, draft: Path) -> None:
    assert_good(check_family(family, draft))


@pytest.mark.slow
@pytest.mark.model
def test_real_models_give_the_text_of_transformers() -> None:
    for found in check_real(lambda _: None):
        assert_good(found)


@pytest.mark.parametrize("family", ["bloom", "gpt_neo"])
def test_a_lost_bias_or_window_is_seen(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: a detour that forgets what its family does to scores."""
    monkeypatch.setattr(rerouting, "ScoreRule", lambda **_: PLAIN)
    save_random_model(family, tmp_path)
    found = check_folder(family, tmp_path, None, [PROMPT], 8)
    assert not found.is_good(REFUSED)
    assert found.max_error > 0.1
