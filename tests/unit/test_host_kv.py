"""KV that leaves the pool for host memory and comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from treecast.engine.base import Segment
from treecast.engine.hf import HFEngine
from treecast.engine.host_kv import HostKV
from treecast.engine.kv_tensors import KVTensors, LayerShape
from treecast.engine.loading import LoadOptions, fingerprint
from treecast.errors import EngineLost, ModelError

from .tiny_target import tiny_target

PLACES = 12
SHAPES = [LayerShape(2, 4, 6), LayerShape(1, 4, 4)]
CPU = torch.device("cpu")


def filled(lossy: bool = False) -> KVTensors:
    tensors = KVTensors(SHAPES, PLACES, torch.float32, CPU, lossy)
    source = torch.Generator().manual_seed(3)
    for layer in range(len(SHAPES)):
        for plane in tensors.layer(layer):
            plane.copy_(torch.randn(plane.shape, generator=source))
    return tensors


def contents(tensors: KVTensors) -> list[Tensor]:
    return [plane.clone() for plane in tensors.read(range(PLACES))]


PLACE = st.integers(0, PLACES - 1)
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("copy"), st.lists(st.tuples(PLACE, PLACE), max_size=4)),
        st.tuples(st.just("save"), st.lists(PLACE, max_size=4, unique=True)),
        st.tuples(st.just("load"), st.lists(PLACE, min_size=4, max_size=4, unique=True)),
        st.tuples(st.just("forget"), st.just([])),
    ),
    max_size=12,
)


@given(MOVES)
@settings(deadline=None)
def test_moves_have_the_effect_of_their_order_when_they_are_done_later(
    moves: list[tuple[str, list]],  # type: ignore[type-arg]
) -> None:
    """The oracle settles after every single one."""
    late, oracle = filled(), filled()
    saved: dict[int, int] = {}
    for key, (kind, what) in enumerate(moves):
        for tensors in (late, oracle):
            if kind == "copy":
                pairs = {target: source for source, target in what}
                tensors.copy(list(pairs.values()), list(pairs))
            elif kind == "save":
                tensors.save(key, what)
            elif saved and kind == "load":
                oldest = min(saved)
                tensors.load(oldest, what[: saved[oldest]])
            elif saved:
                tensors.forget(min(saved))
        oracle.settle()
        if kind == "save":
            saved[key] = len(what)
        elif saved and kind != "copy":
            del saved[min(saved)]
    for found, expected in zip(contents(late), contents(oracle), strict=True):
        assert torch.equal(found, expected)


def test_chunks_come_back_in_their_places_when_there_are_many() -> None:
    plane = torch.randn(3, 3000, 5).to(torch.bfloat16)
    other = torch.randn(1, 3000, 3).to(torch.bfloat16)
    before = [plane.clone(), other.clone()]
    host = HostKV([plane, other], lossy=False)
    places = torch.randperm(3000)[:2500].tolist()
    host.save(1, places)
    plane[:, places], other[:, places] = 0, 0
    host.load(1, places)
    assert torch.equal(plane, before[0])
    assert torch.equal(other, before[1])
    assert host.position_bytes == 2 * (3 * 5 + 3)


def test_rows_come_back_within_half_a_step_when_they_were_rounded_to_int8() -> None:
    plane = torch.randn(4, 50, 8) * torch.logspace(-3, 3, 50)[None, :, None]
    plane[0, 0] = 0
    before = plane.clone()
    host = HostKV([plane], lossy=True)
    host.save(1, range(50))
    plane.zero_()
    host.load(1, range(50))
    bound = before.abs().amax(-1, keepdim=True) / 254
    assert bool(((plane - before).abs() <= bound * 1.001).all())
    assert not torch.equal(plane, before)
    assert host.position_bytes == 4 * (8 + 4)


def test_the_engine_is_lost_when_the_host_has_no_memory_for_what_is_swapped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not the step's error: other sequences may lie in those pages by now."""

    def refuse(*size: object, **options: object) -> Tensor:
        raise RuntimeError("can't allocate memory")

    tensors = filled()
    tensors.save(1, range(3))
    monkeypatch.setattr("treecast.engine.host_kv.torch.empty", refuse)
    with pytest.raises(EngineLost, match="no host memory for 336 bytes of swapped KV"):
        tensors.settle()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_target().save_pretrained(path)
    return path


TEXT = [3 + k % 40 for k in range(100)]


def row_after_a_swap(engine: HFEngine) -> tuple[bytes, bytes]:
    """The next row's bits, of a sequence that stayed, and of one that was away meanwhile."""
    sequences = [engine.allocate(len(TEXT) + 1) for _ in range(2)]
    for sequence in sequences:
        engine.forward([Segment.chain(sequence, TEXT, [])])
        engine.commit(sequence, range(len(TEXT)))
    swapped = engine.swap_out(sequences[1])
    assert swapped.nbytes == len(TEXT) * engine.usage.position_bytes
    stranger = engine.allocate(128)
    engine.forward([Segment.chain(stranger, [5] * 120, [])])
    engine.allocate(64)
    back = engine.swap_in(swapped, len(TEXT) + 1)
    rows = engine.forward([Segment.chain(s, [7], [0]) for s in (sequences[0], back)])
    kept, moved = (np.asarray(row[0]).tobytes() for row in rows)
    return kept, moved


def test_the_engine_is_lost_when_a_move_fails_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moves behind it are never done, so the next pass would read wrong keys."""
    engine = HFEngine.load(folder, pool_tokens=512)
    sequence = engine.allocate(len(TEXT) + 1)
    engine.forward([Segment.chain(sequence, TEXT, [])])
    engine.commit(sequence, range(len(TEXT)))
    load, failures = HostKV.load, iter([RuntimeError("out of memory")])

    def fails_once(self: HostKV, key: int, places: Sequence[int]) -> None:
        for failure in failures:
            raise failure
        load(self, key, places)

    monkeypatch.setattr(HostKV, "load", fails_once)
    back = engine.swap_in(engine.swap_out(sequence), len(TEXT) + 1)
    with pytest.raises(EngineLost, match=r"moves within the KV pool failed: .*out of memory"):
        engine.forward([Segment.chain(back, [7], [0])])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_are_the_same_when_a_sequence_was_swapped_out(folder: Path, dtype: str) -> None:
    engine = HFEngine.load(folder, dtype=dtype, pool_tokens=512)  # type: ignore[arg-type]
    kept, moved = row_after_a_swap(engine)
    assert kept == moved


def test_bits_differ_when_a_sequence_was_swapped_out_as_int8(folder: Path) -> None:
    """And the fingerprint says so."""
    engine = HFEngine.load(folder, numerics="fast", pool_tokens=512, swap_dtype="int8")
    kept, moved = row_after_a_swap(engine)
    assert kept != moved
    same = HFEngine.load(folder, numerics="fast", pool_tokens=512)
    assert engine.info.fingerprint != same.info.fingerprint
    assert engine.usage.position_bytes < same.usage.position_bytes


def test_swapping_with_loss_is_refused_where_bits_are_promised() -> None:
    with pytest.raises(ModelError) as refusal:
        LoadOptions("float32", "exact", "cpu", None, swap_dtype="int8")
    assert refusal.value.message == (
        "swapping KV as int8 loses bits, which numerics exact promise to keep; "
        "it needs numerics fast"
    )


def test_the_fingerprint_is_that_of_before_when_nothing_is_lost() -> None:
    options = LoadOptions("float32", "fast", "cpu", None)
    lossy = LoadOptions("float32", "fast", "cpu", None, swap_dtype="int8")
    assert fingerprint("r", options) != fingerprint("r", lossy)


def test_the_engine_is_lost_when_the_device_fails_but_not_when_its_memory_is_full(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = HFEngine.load(folder, dtype="float32", pool_tokens=256, threads=1)
    sequence = engine.allocate(8)
    for error, raised in (
        (torch.OutOfMemoryError("full"), torch.OutOfMemoryError),
        (torch.AcceleratorError("an illegal memory access"), EngineLost),
    ):
        monkeypatch.setattr(engine._executor, "_runner", failing(error))
        with pytest.raises(raised, match=str(error)):
            engine.forward([Segment(sequence, [1], [-1], [0])])


def failing(error: Exception) -> Callable[..., Tensor]:
    def run(*args: object) -> Tensor:
        raise error

    return run
