"""Pools kept in fewer bits: how far logits move, and that trees still change no token."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from treecast.bench.families.configs import VOCAB, make_config
from treecast.bench.families.drafting import RandomTrees
from treecast.decoding.local import generate
from treecast.engine import kv_stored
from treecast.engine.base import Segment
from treecast.engine.exactness import differing_rows
from treecast.engine.hf import HFEngine
from treecast.engine.kv_dtype import KV_FORMATS
from treecast.errors import ModelError
from treecast.sampling.noise import noise_key
from treecast.sampling.params import SamplingParams

NUMERICS = ("exact", "fast")
ERRORS = {"float16": 2e-3, "bfloat16": 2e-2, "int8": 4e-2, "fp8": 2e-1}
"""Most that logits may move, by the norm of those over a float32 pool."""


@pytest.fixture(scope="module", params=("llama", "gemma2"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama's fused stack, and modules with windows and a soft cap."""
    made = tmp_path_factory.mktemp("models") / "model"
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(make_config(request.param))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(made)
    return made


def load(folder: Path, kv_dtype: Any, numerics: Any = "exact") -> HFEngine:
    return HFEngine.load(
        folder, dtype="float32", numerics=numerics, kv_dtype=kv_dtype, pool_tokens=1024, threads=1
    )


def logits_of(engine: HFEngine) -> NDArray[np.float32]:
    """A prompt in two chunks, a tree, a commit out of its middle, and a step from there."""
    rng = np.random.default_rng(5)
    tokens = [int(token) for token in rng.integers(3, VOCAB, 110)]
    sequence = engine.allocate(192)
    found = []
    for begin in (0, 50):
        (rows,) = engine.forward([Segment.chain(sequence, tokens[begin : begin + 50], range(50))])
        found += [rows[i] for i in range(50)]
        engine.commit(sequence, range(50))
    (rows,) = engine.forward([Segment(sequence, tokens[100:106], [-1, 0, 0, 2, 2, 4], range(6))])
    found += [rows[i] for i in range(6)]
    engine.commit(sequence, [0, 2, 4, 5])
    (rows,) = engine.forward([Segment.chain(sequence, tokens[106:107], [0])])
    engine.free(sequence)
    return np.stack([*found, rows[0]])


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("kv_dtype", ERRORS)
def test_logits_move_as_little_as_the_type_allows(
    folder: Path, kv_dtype: str, numerics: str
) -> None:
    expected = logits_of(load(folder, "auto", numerics))
    found = logits_of(load(folder, kv_dtype, numerics))
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    assert 0 < error < ERRORS[kv_dtype]


def test_float32_under_float32_is_the_pool_as_ever(folder: Path) -> None:
    assert np.array_equal(logits_of(load(folder, "auto")), logits_of(load(folder, "float32")))


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8", "bfloat16"])
def test_bits_do_not_depend_on_tree_or_batch(folder: Path, kv_dtype: str) -> None:
    assert differing_rows(load(folder, kv_dtype)) == 0


def test_rows_read_unrounded_by_their_own_pass_are_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of bits can fail: a row that its own pass sees better than later ones do."""

    class Unrounded(kv_stored.StoredPass):
        def attend(self, layer: int, query: Any, key: Any, value: Any, *rest: Any) -> Any:
            widened = self._stored.widened

            def own_rows_exact(*given: Any) -> Any:
                keys, values = widened(*given)
                pools = self._pools_of(key.shape[1], key.shape[-1], value.shape[-1])
                for wide, pool, new in zip((keys, values), pools, (key, value), strict=True):
                    pool[:, self._at, : wide.shape[-1]] = wide
                    pool[:, self._new_at, : wide.shape[-1]] = new[0, :, : len(self._new)]
                return (
                    pools[0][:, self._at],
                    pools[1][:, self._at, : value.shape[-1]],
                )

            self._stored.widened = own_rows_exact  # type: ignore[method-assign]
            try:
                return super().attend(layer, query, key, value, *rest)
            finally:
                self._stored.widened = widened  # type: ignore[method-assign]

    monkeypatch.setattr("treecast.engine.executor.StoredPass", Unrounded)
    assert differing_rows(load(folder, "fp8")) > 0


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_trees_change_no_token(folder: Path, kv_dtype: str, temperature: float) -> None:
    engine = load(folder, kv_dtype)
    sampling = SamplingParams(temperature=temperature, max_tokens=40, ignore_eos=True)
    rng = random.Random(3)
    for seed in range(3):
        prompt = [rng.randrange(3, VOCAB) for _ in range(70)]
        plain = generate(engine, prompt, sampling, noise_key(seed))
        trees = RandomTrees(plain.tokens, VOCAB, seed)
        drafted = generate(engine, prompt, sampling, noise_key(seed), trees)
        assert drafted.tokens == plain.tokens
        assert drafted.steps < plain.steps


def test_forks_keep_their_scales(folder: Path) -> None:
    engine = load(folder, "int8")
    tokens = list(range(3, 83))
    whole = engine.allocate(128)
    engine.forward([Segment.chain(whole, tokens, [])])
    engine.commit(whole, range(80))
    forked = engine.fork(whole, 70, 128)
    (rows,) = engine.forward([Segment.chain(forked, tokens[70:], range(10))])
    alone = engine.allocate(128)
    (expected,) = engine.forward([Segment.chain(alone, tokens, range(70, 80))])
    assert all(np.array_equal(rows[i], expected[i]) for i in range(10))


def test_fingerprints_tell_pools_apart(folder: Path) -> None:
    prints = {load(folder, kept).info.fingerprint for kept in ("auto", *ERRORS)}
    assert len(prints) == 1 + len(ERRORS)


def test_kernels_on_a_device_refuse_other_types_by_name(folder: Path) -> None:
    with pytest.raises(ModelError, match="KV dtype int8 is for CPU"):
        HFEngine.load(folder, dtype="float32", kernels="triton", kv_dtype="int8")


def test_int8_has_a_scale_for_each_row_and_survives_zeros() -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, -127.0], [1e-3, 2e-3]])
    form = KV_FORMATS["int8"]
    codes, scale = form.quantize(rows)
    assert codes.tolist() == [[0, 0], [1, -127], [64, 127]]
    assert form.widen(codes, scale, torch.float32)[:2].tolist() == [[0, 0], [1, -127]]


def test_fp8_keeps_what_is_beyond_its_range_finite() -> None:
    form = KV_FORMATS["fp8"]
    codes, scale = form.quantize(torch.tensor([[1e4, -1e4, 0.5]]))
    assert form.widen(codes, scale, torch.float32).tolist() == [[448.0, -448.0, 0.5]]
