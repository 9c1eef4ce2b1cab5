"""Streamed layers against resident ones: not a bit may differ, in whatever order they come."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from treecast.bench.families.configs import FAMILIES, VOCAB
from treecast.engine import linears, loading, unread
from treecast.engine.base import Segment
from treecast.engine.hf import HFEngine
from treecast.engine.loading import LoadOptions
from treecast.engine.memory import empty_of, least_share
from treecast.engine.offload import LayerStream, Offload
from treecast.engine.quantized import has_fbgemm
from treecast.errors import EngineLost, ModelError

LAYERS = 5
NUMERICS = ("exact", "fast")
STREAMED = ("llama", "gpt2", "gemma2", "bloom", "falcon (ALiBi)")
READ_WHOLE = ("mixtral", "gpt_oss")

Save = Callable[..., Path]


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Make a tiny random model of a family with `LAYERS` layers; saved once each."""
    made: dict[str, Path] = {}

    def saved(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("models") / "model"
            random_model(family).save_pretrained(made[family])
        return made[family]

    return saved


def random_model(family: str, **others: Any) -> Any:
    name, options = FAMILIES[family]
    depth = next(k for k in ("num_hidden_layers", "n_layer", "n_layers") if k in options)
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(**{**options, depth: LAYERS, **others})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def load(folder: Path, numerics: Any = "exact", **options: Any) -> HFEngine:
    return HFEngine.load(
        folder, numerics=numerics, pool_tokens=1024, threads=1, **{"dtype": "float32", **options}
    )


def share_of(folder: Path, resident: int = 0) -> int:
    """Device memory that holds no layer but the buffers', or so many."""
    options = LoadOptions("float32", "exact", "cpu", None)
    model, _ = empty_of(folder, options)
    layer = unread.decoder_layers(model)[0]
    sizes = sum(weight.nbytes for weight in layer.parameters())
    return least_share(model, options) + resident * sizes


@contextmanager
def offloaded(folder: Path, scratch: Path, *, resident: int = 0, **options: Any) -> Iterator[Any]:
    streamed = Offload("disk", share_of(folder, resident), scratch)
    engine = load(folder, offload=streamed, **options)
    try:
        yield engine
    finally:
        engine.close()


def logits_of(engine: HFEngine) -> NDArray[np.float32]:
    """A prompt, a tree below it, a commit and a step from there: [rows, vocab]."""
    rng = np.random.default_rng(5)
    tokens = [int(token) for token in rng.integers(3, VOCAB, 60)]
    sequence = engine.allocate(128)
    (rows,) = engine.forward([Segment.chain(sequence, tokens[:40], range(40))])
    found = [rows[i] for i in range(40)]
    engine.commit(sequence, range(40))
    (rows,) = engine.forward([Segment(sequence, tokens[40:46], [-1, 0, 0, 2, 2, 4], range(6))])
    found += [rows[i] for i in range(6)]
    engine.commit(sequence, [0, 2, 4, 5])
    (rows,) = engine.forward([Segment.chain(sequence, tokens[46:47], [0])])
    engine.free(sequence)
    return np.stack([*found, rows[0]])


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("family", [*STREAMED, *READ_WHOLE])
def test_no_bit_differs_from_the_resident_model(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, numerics: str
) -> None:
    """Nor is the model ever whole in memory, where its checkpoint's names are its modules'."""
    folder = save(family)
    expected = logits_of(load(folder, numerics))
    if family in STREAMED:
        monkeypatch.setattr(loading, "reading_told", refuse)
    with offloaded(folder, tmp_path, numerics=numerics) as engine:
        assert np.array_equal(logits_of(engine), expected)
        before = engine.moved_bytes
        assert np.array_equal(logits_of(engine), expected)
        assert engine.moved_bytes > before


@pytest.mark.slow
@pytest.mark.parametrize("numerics", NUMERICS)
def test_no_bit_differs_under_the_kernels_of_a_device(
    save: Save, tmp_path: Path, numerics: str
) -> None:
    """By Triton's interpreter; weights lie there as they do on a GPU."""
    folder = save("llama")
    tokens = list(range(3, 12))
    found = []
    with offloaded(folder, tmp_path, numerics=numerics, kernels="triton") as engine:
        for one in (load(folder, numerics, kernels="triton"), engine):
            sequence = one.allocate(64)
            (rows,) = one.forward([Segment.chain(sequence, tokens, [7, 8])])
            found.append([rows[i] for i in range(2)])
        assert engine.moved_bytes > 0
    assert np.array_equal(found[0], found[1])


def refuse(folder: Path) -> None:
    raise AssertionError(f"{folder} was read whole")


def test_no_bit_differs_when_some_layers_stay(save: Save, tmp_path: Path) -> None:
    folder = save("llama")
    expected = logits_of(load(folder))
    moved = []
    for resident in (0, 2):
        with offloaded(folder, tmp_path, resident=resident) as engine:
            assert np.array_equal(logits_of(engine), expected)
            moved.append(engine.moved_bytes)
    assert moved[1] < moved[0]


def test_weights_that_are_bfloat16_move_half_the_bytes(save: Save, tmp_path: Path) -> None:
    folder = save("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(short := tmp_path / "short")
    moved = []
    for each in (folder, short):
        expected = logits_of(load(each))
        with offloaded(each, tmp_path) as engine:
            assert np.array_equal(logits_of(engine), expected)
            moved.append(engine.moved_bytes)
    assert moved[1] < 0.8 * moved[0]


@pytest.mark.skipif(not has_fbgemm(), reason="weights of 16 bits need FBGEMM's kernels")
def test_bits_and_fingerprint_are_those_of_float32_where_auto_would_keep_16_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor without bfloat16 products, and weights that are bfloat16 numbers.

    Products of 2048 inputs are added up in another order from 16 bits, on AVX2 at least.
    """
    monkeypatch.setattr(linears, "multiplies_bfloat16", lambda: False)
    model = random_model("llama", intermediate_size=2048)
    model.bfloat16().save_pretrained(folder := tmp_path / "short")
    auto, wide = (load(folder, weights=kind) for kind in ("auto", "float32"))
    with offloaded(folder, tmp_path) as engine:
        assert np.array_equal(logits_of(engine), logits_of(wide))
        assert engine.info.fingerprint == wide.info.fingerprint
    assert auto.info.fingerprint != wide.info.fingerprint


def test_the_fingerprint_is_that_of_the_resident_model_where_auto_is_float32(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "auto_quantizes", lambda: False)
    folder = save("llama")
    with offloaded(folder, tmp_path) as engine:
        assert engine.info.fingerprint == load(folder).info.fingerprint


def test_the_scratch_file_is_gone_when_the_process_is(save: Save, tmp_path: Path) -> None:
    with offloaded(save("llama"), tmp_path):
        assert not list(tmp_path.iterdir())


def test_layers_are_not_read_before_their_turn(save: Save, monkeypatch: Any) -> None:
    """The model is never whole in memory: at most one layer's own weights are there."""
    folder = save("llama")
    filled: list[int] = []
    fill = unread.LayerSource.fill

    def watched(self: Any, index: int, layer: Any) -> None:
        others = [w for w in self._layers.parameters() if not w.is_meta]
        assert not others, "another layer is still filled"
        filled.append(index)
        fill(self, index, layer)

    monkeypatch.setattr(unread.LayerSource, "fill", watched)
    load(folder, offload=Offload("disk", share_of(folder), folder.parent)).close()
    assert set(filled) == set(range(LAYERS))


def test_buffers_exchanged_too_early_are_seen(save: Save, tmp_path: Path, monkeypatch: Any) -> None:
    """The check of bits can fail: a layer that computes while the next one is put in its place."""
    folder = save("llama")
    expected = logits_of(load(folder))

    def hasty(self: Any, layer: int, compute: Any) -> Any:
        def computed(*args: Any) -> Any:
            self.enter(layer)
            self.leave(layer)
            coming = self._buffers[self._buffer_of[layer]].coming
            if coming is not None:
                coming.result()
            return compute(*args)

        return computed

    with offloaded(folder, tmp_path) as engine:
        assert np.array_equal(logits_of(engine), expected)
    monkeypatch.setattr(LayerStream, "wrap", hasty)
    # Not fused then: the runner's own check sees it, and takes the modules.
    monkeypatch.setattr("treecast.engine.runner._TOLERANCE", {torch.float32: float("inf")})
    with offloaded(folder, tmp_path) as engine:
        assert not np.array_equal(logits_of(engine), expected)


def test_passes_that_end_halfway_do_no_harm(save: Save, tmp_path: Path) -> None:
    folder = save("llama")
    expected = logits_of(load(folder))
    with offloaded(folder, tmp_path) as engine:
        layers = engine._executor._runner._layers
        whole, layers[3] = layers[3], fails
        with pytest.raises(RuntimeError, match="halfway"):
            logits_of(engine)
        layers[3] = whole
        assert np.array_equal(logits_of(engine), expected)


def fails(*_: Any) -> None:
    raise RuntimeError("halfway")


def test_a_lost_scratch_file_ends_the_engine(save: Save, tmp_path: Path) -> None:
    with offloaded(save("llama"), tmp_path) as engine:
        os.ftruncate(engine._executor._residency._stream._store._writing, 0)
        with pytest.raises(EngineLost, match="cannot be read"):
            logits_of(engine)


def test_all_stays_when_all_fits(save: Save, tmp_path: Path) -> None:
    folder = save("llama")
    engine = load(folder, offload=Offload("disk", 2**30, tmp_path))
    logits_of(engine)
    assert engine.moved_bytes == 0
    engine.close()


def test_a_share_too_small_is_refused_with_the_numbers(save: Save, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"may take 0\.00 GiB of the device; embedding"):
        load(save("llama"), offload=Offload("disk", 1000, tmp_path))


def test_adapters_are_refused_before_anything_is_read(save: Save, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="adapters a cannot be served with offload disk; they ne"):
        load(save("llama"), offload=Offload("disk"), adapters={"a": tmp_path})


def test_offload_to_the_host_is_refused_on_the_host(save: Save) -> None:
    with pytest.raises(ModelError, match="offload cpu is for a GPU"):
        load(save("llama"), offload=Offload("cpu", 1000))
