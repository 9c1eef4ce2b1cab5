"""The engine over Triton's kernels: its logits, its bits, and its padded and captured passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from treecast.engine import steps
from treecast.engine.base import KVSequence, Segment
from treecast.engine.exactness import differing_rows
from treecast.engine.hf import HFEngine
from treecast.engine.pooled import paged
from treecast.errors import ModelError

from .bed import random_tree

VOCAB, CONTEXT = 96, 160


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights, saved as users' models are."""
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        vocab_size=VOCAB,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    made = tmp_path_factory.mktemp("models") / "llama"
    model.save_pretrained(made)
    return made


def load(folder: Path, numerics: Any, device: torch.device, **options: Any) -> HFEngine:
    return HFEngine.load(
        folder,
        dtype="float32",
        numerics=numerics,
        device=str(device),
        kernels="triton",
        pool_tokens=2048,
        **options,
    )


def logits_of(engine: HFEngine, count: int = 5) -> list[NDArray[np.float32]]:
    """A prompt, a tree below it beside another sequence, a commit, and a step from there."""
    rng = np.random.default_rng(5)

    def tokens(count: int) -> list[int]:
        return [int(token) for token in rng.integers(3, VOCAB, count)]

    one, other = engine.allocate(200), engine.allocate(100)
    engine.forward([Segment.chain(one, tokens(count), []), Segment.chain(other, tokens(2), [])])
    engine.commit(one, range(count))
    engine.commit(other, range(2))
    tree = [-1, 0, 0, 2, 2, 4]
    segments = [
        Segment(one, tokens(6), tree, range(6)),
        Segment(other, tokens(1), [-1], [0]),
    ]
    found = [rows[i] for rows in engine.forward(segments) for i in range(len(rows))]
    engine.commit(one, [0, 2, 4, 5])
    engine.commit(other, [0])
    (rows,) = engine.forward([Segment(one, tokens(2), [-1, 0], [1])])
    engine.free(one)
    engine.free(other)
    return [*found, rows[0]]


@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_logits_are_those_of_the_definition(
    numerics: str, folder: Path, device: torch.device
) -> None:
    expected = logits_of(HFEngine.load(folder, dtype="float32", numerics="oracle"))
    found = logits_of(load(folder, numerics, device))
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_logits_are_those_of_the_definition_when_long(
    numerics: str, folder: Path, device: torch.device
) -> None:
    expected = logits_of(HFEngine.load(folder, dtype="float32", numerics="oracle"), 130)
    found = logits_of(load(folder, numerics, device), 130)
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.slow
def test_padding_changes_no_bit_of_an_exact_pass(
    folder: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    padded = logits_of(load(folder, "exact", device))
    monkeypatch.setattr(steps, "ROW_BUCKETS", ())
    assert np.array_equal(padded, logits_of(load(folder, "exact", device)))


def test_the_device_says_which_token_is_likeliest(folder: Path, device: torch.device) -> None:
    engine = load(folder, "fast", device)
    sequence = engine.allocate(64)
    (rows,) = engine.forward([Segment(sequence, [5, 6, 7, 8], [-1, 0, 0, 2], [0, 2, 3])])
    assert [rows.likeliest(i) for i in range(3)] == [int(rows[i].argmax()) for i in range(3)]


def test_the_likeliest_is_the_lowest_of_a_tie_and_none_where_the_model_broke(
    device: torch.device,
) -> None:
    logits = torch.zeros(4, 5000, device=device)
    logits[1, [70, 4000]] = 3
    logits[2, 9] = torch.nan
    logits[3, 9] = torch.inf
    assert steps.likeliest(logits).tolist() == [0, 70, -1, -1]


def test_rows_stay_when_their_buffers_are_used_again(folder: Path, device: torch.device) -> None:
    engine = load(folder, "fast", device)
    found, again = [], []
    for token in (5, 9):
        sequence = engine.allocate(64)
        (rows,) = engine.forward([Segment(sequence, [token], [-1], [0])])
        found.append(rows)
        again.append(rows[0].copy())
    assert not np.array_equal(*again)
    assert np.array_equal(found[0][0], again[0])


@pytest.mark.gpu
def test_a_captured_pass_is_the_uncaptured_one(folder: Path) -> None:
    """Three times: as it is, as it is captured, and replayed with other pages and trees."""
    cuda = torch.device("cuda")
    plain = load(folder, "exact", cuda)
    captured = load(folder, "exact", cuda)
    plain._executor._steps._most_graphs = 0  # type: ignore[union-attr]
    for _ in range(3):
        assert np.array_equal(logits_of(captured), logits_of(plain))
    assert any(step._graph is not None for step in captured._executor._steps._steps.values())  # type: ignore[union-attr]


@pytest.mark.slow
def test_bits_do_not_depend_on_the_pass_when_exact(folder: Path, device: torch.device) -> None:
    assert differing_rows(load(folder, "exact", device)) == 0


@pytest.mark.slow
def test_bits_depend_on_the_pass_when_fast(folder: Path, device: torch.device) -> None:
    """The negative control."""
    assert differing_rows(load(folder, "fast", device)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("numerics", ["fast", "exact"])
def test_the_pool_is_that_of_a_fresh_prompt_when_paths_are_committed(
    numerics: str, folder: Path, device: torch.device
) -> None:
    engine = load(folder, numerics, device)
    rng = np.random.default_rng(1)
    text: list[int] = []
    sequence = engine.allocate(300)
    for turn in range(12):
        parents = random_tree(9, turn)
        tokens = [int(token) for token in rng.integers(3, VOCAB, 9)]
        engine.forward([Segment(sequence, tokens, parents, [])])
        path = path_to(8, parents)
        engine.commit(sequence, path)
        text += [tokens[row] for row in path]
    fresh = engine.allocate(300)
    engine.forward([Segment.chain(fresh, text, [])])
    engine.commit(fresh, range(len(text)))
    for found, expected in zip(contents(engine, sequence), contents(engine, fresh), strict=True):
        torch.testing.assert_close(found, expected, atol=0 if numerics == "exact" else 1e-4, rtol=0)


def contents(engine: HFEngine, sequence: KVSequence) -> list[Tensor]:
    """[planes, committed positions, dim] the sequence's keys and values."""
    own = paged(sequence)
    return engine._executor._tensors.read(own.places(0, own.length))


def path_to(row: int, parents: Sequence[int]) -> list[int]:
    path: list[int] = []
    while row >= 0:
        path.append(row)
        row = parents[row]
    return path[::-1]


def test_cuda_is_refused_by_name_when_there_is_none(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ModelError, match="device cuda"):
        HFEngine.load(folder, device="cuda")
