"""The profile of a step: its phases are the step, and a slow part shows where it is."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from treecast.bench import phases
from treecast.bench.phases import profile_steps
from treecast.engine.linears import RowLayers
from treecast.engine.loading import LoadOptions

SLOW_S = 0.002


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    made = tmp_path_factory.mktemp("models") / "tiny"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made)
    return made


OPTIONS = LoadOptions("float32", "exact", "cpu", 1)


def test_phases_add_up_to_the_step(folder: Path) -> None:
    found = profile_steps(folder, OPTIONS, rows=(1, 8), steps=4)
    assert [one.rows for one in found] == [1, 8]
    for one in found:
        assert sum(one.phases_ms.values()) == pytest.approx(one.wall_ms)
        assert all(ms > 0 for ms in one.phases_ms.values())
        assert any("linear" in operator.name for operator in one.operators)


class Slow(nn.Module):
    """A linear layer that sleeps first."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._linear = linear

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(SLOW_S)
        y: Tensor = self._linear(x)
        return y


def test_slow_products_are_seen_as_linears(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = phases._timed_layers

    def slowed(layers: RowLayers, laps: phases.Laps) -> RowLayers:
        return inner(replace(layers, linear=Slow), laps)

    monkeypatch.setattr(phases, "_timed_layers", slowed)
    (found,) = profile_steps(folder, OPTIONS, rows=(2,), steps=4)
    assert found.phases_ms["linears"] >= 2 * 4 * 1000 * SLOW_S  # layers, products in each
    assert found.phases_ms["head"] >= 1000 * SLOW_S
