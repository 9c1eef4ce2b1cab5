"""What a model takes, reckoned from headers; and what is free, read from files of our own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from treecast.bench.families.configs import make_config
from treecast.engine import memory, progress, quantized
from treecast.engine.free_memory import free_host_bytes
from treecast.engine.hf import HFEngine
from treecast.engine.loading import LoadOptions
from treecast.engine.memory import MemoryNeed, estimate
from treecast.engine.progress import LoadProgress
from treecast.errors import ModelError
from treecast.settings import Weights

OPTIONS = LoadOptions("float32", "exact", "cpu", None)
MEMINFO = "MemTotal: 1000 kB\nMemAvailable:    100 kB\n"


@pytest.fixture(scope="module", params=("llama", "gpt2", "falcon (multi-query)", "mixtral"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "model"
    AutoModelForCausalLM.from_config(make_config(request.param)).save_pretrained(made)
    return made


def test_the_kv_pool_is_what_the_engine_takes(folder: Path) -> None:
    engine: Any = HFEngine.load(folder, dtype="float32", pool_tokens=640, threads=1)
    planes = engine._executor._tensors._planes.values()
    assert estimate(folder, OPTIONS, 640).kv_pool == sum(plane.nbytes for plane in planes)


def test_weights_are_counted_as_they_are_computed_with(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    own = sum(weight.nbytes for weight in model.parameters())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    packed_again = model.get_output_embeddings().weight.nbytes if tied else 0
    need = estimate(folder, OPTIONS, 640)
    assert (need.weights, need.loading) == (own + packed_again, own)


@pytest.mark.parametrize(("outputs", "inputs"), [(40, 70), (64, 64)])
def test_quantized_weights_are_counted_as_they_are_kept(outputs: int, inputs: int) -> None:
    kept = quantized.Int4Linear(torch.nn.Linear(inputs, outputs))
    assert (
        quantized.kept_bytes("int4", outputs, inputs) == kept._packed.nbytes + kept._scales.nbytes
    )
    assert quantized.kept_bytes("int8", outputs, inputs) == outputs * inputs + 4 * outputs


def test_fewer_bits_need_less_memory(folder: Path) -> None:
    kinds: tuple[Weights, ...] = ("float32", "bfloat16", "int8")
    needs = [estimate(folder, replace(OPTIONS, weights=kind), 640).weights for kind in kinds]
    assert needs[0] > needs[1] > needs[2]


def test_what_cannot_fit_is_refused_before_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**16)
    monkeypatch.setattr("treecast.engine.hf.load_model", never)
    with pytest.raises(ModelError, match=r"the model needs .* GiB for weights.*; cpu has 0\.00"):
        HFEngine.load(folder, dtype="float32", pool_tokens=640)


def never(*_: object) -> None:
    raise AssertionError("weights were read")


def test_need_is_most_while_loading_or_while_serving() -> None:
    gib = 2**30
    assert MemoryNeed(4 * gib, 1 * gib, gib, 3 * gib).most == 7 * gib
    assert MemoryNeed(4 * gib, 5 * gib, gib, 3 * gib).most == 10 * gib


@pytest.mark.parametrize(("free", "tokens"), [(2**34, memory.MOST_POOL_TOKENS), (2**28, None)])
def test_a_pool_of_auto_takes_half_of_what_a_host_has_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch, free: int, tokens: int | None
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    _, found = memory.fitted(folder, OPTIONS, None)
    need = estimate(folder, OPTIONS, 0)
    per_token = estimate(folder, OPTIONS, 1).kv_pool
    assert found == (tokens or (free - need.most) // 2 // per_token)


def test_free_is_what_the_kernel_says_where_no_group_limits(tmp_path: Path) -> None:
    assert free(tmp_path, {}) == 100 * 1024


def test_free_is_what_the_tightest_group_has_left(tmp_path: Path) -> None:
    group = {"memory.max": "50000", "memory.current": "30000", "memory.stat": "inactive_file 4000"}
    assert free(tmp_path, {"a/b": group}) == 24000
    above = group | {"memory.max": "40000"}
    assert free(tmp_path, {"a/b": group | {"memory.max": "max"}, "a": above}) == 14000


def free(root: Path, groups: dict[str, dict[str, str]]) -> int:
    (root / "meminfo").write_text(MEMINFO)
    (root / "own").write_text("0::/a/b\n")
    for name, files in groups.items():
        (root / "groups" / name).mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (root / "groups" / name / file).write_text(text)
    return free_host_bytes(root / "meminfo", root / "groups", root / "own")


def test_progress_is_told_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_log", Recorder(told))
    reading = LoadProgress(4 * 2**30)
    for _ in range(4):
        now[0] += 3
        reading.add(2**30)
    assert told == [{"done_gib": 2.0, "total_gib": 4.0}, {"done_gib": 4.0, "total_gib": 4.0}]


class Recorder:
    def __init__(self, told: list[dict[str, float]]) -> None:
        self._told = told

    def info(self, event: str, **values: float) -> None:
        self._told.append(values)
