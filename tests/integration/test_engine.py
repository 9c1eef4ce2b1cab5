"""The Hugging Face engine against transformers itself, and against its own promises."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from treecast.checkpoints import ensure_default_target
from treecast.engine.base import KVSequence, Segment
from treecast.engine.exactness import differing_rows
from treecast.engine.hf import HFEngine
from treecast.engine.pooled import paged
from treecast.errors import InvalidRequest, InvalidTree, ModelError, Overloaded
from treecast.kernels.plan import SegmentLayout

VOCAB = 128
CONTEXT = 1024
TOLERANCE = 1e-4
NUMERICS = ["exact", "fast", "oracle"]

_COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, **_COMMON,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT, **_COMMON
    ),
    "qwen3": lambda: transformers.Qwen3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=CONTEXT, **_COMMON,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models with random weights, saved as users' models are."""
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config())
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        made[name] = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(made[name])
    return made


@pytest.fixture(params=NUMERICS)
def engine(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[HFEngine]:
    engine = HFEngine.load(folders["llama"], dtype="float32", numerics=request.param, threads=2)
    yield engine
    usage = engine.usage
    assert usage.free + usage.used == usage.total


def peer(folder: Path) -> Callable[[Sequence[int]], NDArray[np.float32]]:
    """Transformers' own forward of one text: [len(tokens), vocab]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def forward(tokens: Sequence[int]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = model(torch.tensor([list(tokens)])).logits[0].numpy()
        return logits

    return forward


def random_parents(count: int, rng: random.Random) -> list[int]:
    """A tree of that many rows; deep and bushy parts both occur."""
    return [rng.choice([row - 1, rng.randint(-1, row - 1)]) if row else -1 for row in range(count)]


def random_tokens(count: int, rng: random.Random) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(count)]


def path_to(row: int, parents: Sequence[int]) -> list[int]:
    path: list[int] = []
    while row >= 0:
        path.append(row)
        row = parents[row]
    return path[::-1]


def prefilled(engine: HFEngine, tokens: Sequence[int], capacity: int = 600) -> KVSequence:
    sequence = engine.allocate(capacity)
    for begin in range(0, len(tokens), 64):
        chunk = tokens[begin : begin + 64]
        engine.forward([Segment.chain(sequence, chunk, [])])
        engine.commit(sequence, range(len(chunk)))
    return sequence


def largest_error(
    engine: HFEngine,
    reference: Callable[[Sequence[int]], NDArray[np.float32]],
    prefix: Sequence[int],
    parents: Sequence[int],
    guesses: Sequence[int],
) -> float:
    """Over all nodes: the tree pass against a separate forward of the node's path."""
    sequence = prefilled(engine, prefix)
    count = len(parents)
    (rows,) = engine.forward([Segment(sequence, guesses, parents, range(count))])
    engine.free(sequence)
    worst = 0.0
    for row in range(count):
        path = [guesses[step] for step in path_to(row, parents)]
        expected = reference([*prefix, *path])[-1]
        worst = max(worst, float(np.abs(rows[row] - expected).max()))
    return worst


# --- trees ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "count"), [(5, 1), (70, 24), (128, 100), (33, 256)])
def test_every_node_is_as_if_its_path_were_computed_alone(
    engine: HFEngine, folders: dict[str, Path], length: int, count: int
) -> None:
    rng = random.Random(count)
    prefix, guesses = random_tokens(length, rng), random_tokens(count, rng)
    parents = random_parents(count, rng)
    assert largest_error(engine, peer(folders["llama"]), prefix, parents, guesses) < TOLERANCE


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_other_families_need_no_code_of_their_own(family: str, folders: dict[str, Path]) -> None:
    engine = HFEngine.load(folders[family], dtype="float32", numerics="exact", threads=2)
    rng = random.Random(1)
    prefix, guesses, parents = random_tokens(70, rng), random_tokens(24, rng), None
    parents = random_parents(24, rng)
    assert largest_error(engine, peer(folders[family]), prefix, parents, guesses) < TOLERANCE


def test_the_comparison_fails_when_one_ancestor_bit_is_broken(
    engine: HFEngine, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: a node that does not see its parent."""
    honest, parent_of_last = SegmentLayout.visible, 3

    def one_bit_wrong(layout: SegmentLayout) -> NDArray[np.bool_]:
        visible = honest(layout)
        if len(layout.parents) == 6:
            visible[5, parent_of_last] = not visible[5, parent_of_last]
        return visible

    def one_step_missing(layout: SegmentLayout, row: int) -> list[int]:
        slots = whole(layout, row)
        if len(layout.parents) == 6 and row == 5:
            slots.remove(layout.length + parent_of_last)
        return slots

    whole = SegmentLayout.path_slots
    monkeypatch.setattr(SegmentLayout, "visible", one_bit_wrong)
    monkeypatch.setattr(SegmentLayout, "path_slots", one_step_missing)
    rng = random.Random(3)
    prefix, guesses, parents = random_tokens(40, rng), random_tokens(6, rng), [-1, 0, 0, 1, 2, 3]
    assert largest_error(engine, peer(folders["llama"]), prefix, parents, guesses) > 100 * TOLERANCE


def test_sequences_in_one_pass_do_not_see_each_other(
    engine: HFEngine, folders: dict[str, Path]
) -> None:
    rng, reference = random.Random(5), peer(folders["llama"])
    texts = [random_tokens(count, rng) for count in (3, 64, 130)]
    sequences = [prefilled(engine, text) for text in texts[:2]] + [engine.allocate(200)]
    guesses, parents = random_tokens(20, rng), random_parents(20, rng)
    segments = [Segment(s, guesses, parents, range(20)) for s in sequences[:2]]
    segments.append(Segment.chain(sequences[2], texts[2], [129]))
    *trees, prompt = engine.forward(segments)
    for text, rows in zip(texts[:2], trees, strict=True):
        for row in range(20):
            path = [guesses[step] for step in path_to(row, parents)]
            assert np.abs(rows[row] - reference([*text, *path])[-1]).max() < TOLERANCE
    assert np.abs(prompt[0] - reference(texts[2])[-1]).max() < TOLERANCE


def test_an_empty_segment_beside_others_computes_nothing(
    engine: HFEngine, folders: dict[str, Path]
) -> None:
    idle, busy = engine.allocate(64), engine.allocate(64)
    nothing, row = engine.forward([Segment(idle, [], [], []), Segment.chain(busy, [5], [0])])
    assert (len(nothing), idle.num_rows, busy.num_rows) == (0, 0, 1)
    assert np.abs(row[0] - peer(folders["llama"])([5])[-1]).max() < TOLERANCE


# --- rounds of drafting and committing --------------------------------------------------------


def run_rounds(engine: HFEngine, rounds: int, spoil: int | None = None) -> tuple[Any, Any]:
    """Commit random paths of random trees; pool contents then, and after a fresh prefill.

    In round `spoil` the tokens of another branch are taken to be the committed ones.
    """
    rng = random.Random(11)
    text = random_tokens(20, rng)
    sequence = prefilled(engine, text)
    tokens: list[int] = []
    parents: list[int] = []
    for turn in range(rounds):
        fresh = rng.randint(2, 9)
        grown = [rng.randint(-1, len(parents) + i - 1) for i in range(fresh)]
        new = random_tokens(fresh, rng)
        engine.forward([Segment(sequence, new, grown, [])])
        tokens, parents = tokens + new, parents + grown
        path = path_to(rng.randrange(len(parents)), parents)
        top = path[-1]
        keep = [row for row in range(top + 1, len(parents)) if top in path_to(row, parents)]
        engine.commit(sequence, path, keep)
        text += [tokens[row] if turn != spoil else (tokens[row] + 1) % VOCAB for row in path]
        places = {row: place for place, row in enumerate(keep)} | {top: -1}
        tokens, parents = [tokens[row] for row in keep], [places[parents[row]] for row in keep]
    assert sequence.length == len(text)
    again = prefilled(engine, text)
    found = contents(engine, sequence), contents(engine, again)
    engine.free(sequence)
    engine.free(again)
    return found


def contents(engine: HFEngine, sequence: KVSequence) -> list[Tensor]:
    """[planes, committed positions, dim] the sequence's keys and values."""
    own = paged(sequence)
    return engine._executor._tensors.read(own.places(0, own.length))


def test_pool_equals_a_fresh_prefill_after_fifty_rounds(engine: HFEngine) -> None:
    found, expected = run_rounds(engine, 50)
    for mine, fresh in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, fresh, atol=TOLERANCE, rtol=0)
    if engine._executor._options.numerics == "exact":
        assert all(torch.equal(mine, fresh) for mine, fresh in zip(found, expected, strict=True))
    assert engine.usage.used == 0


def test_pool_differs_when_the_wrong_branch_was_committed(engine: HFEngine) -> None:
    found, expected = run_rounds(engine, 10, spoil=4)
    assert any(
        (mine - fresh).abs().max() > 100 * TOLERANCE
        for mine, fresh in zip(found, expected, strict=True)
    )


# --- sharing and scattering -------------------------------------------------------------------


def test_forks_go_their_own_ways_from_shared_pages(
    engine: HFEngine, folders: dict[str, Path]
) -> None:
    rng, reference = random.Random(2), peer(folders["llama"])
    prompt = random_tokens(150, rng)
    first = prefilled(engine, prompt, 200)
    used = engine.usage.used
    second = engine.fork(first, 149, 200)
    assert engine.usage.used == used + 2  # two full pages are shared
    for sequence, start, token in ((first, 150, 5), (second, 149, 9)):
        (rows,) = engine.forward([Segment.chain(sequence, [token], [0])])
        expected = reference([*prompt[:start], token])[-1]
        assert np.abs(rows[0] - expected).max() < TOLERANCE
    engine.free(first)
    engine.free(second)


def test_a_scattered_sequence_computes_the_same(
    folders: dict[str, Path],
) -> None:
    engine = HFEngine.load(
        folders["llama"], dtype="float32", numerics="exact", pool_tokens=8 * 64, threads=2
    )
    rng = random.Random(8)
    text, guesses = random_tokens(150, rng), random_tokens(12, rng)
    parents = random_parents(12, rng)

    def bits(sequence: KVSequence) -> list[bytes]:
        (rows,) = engine.forward([Segment(sequence, guesses, parents, range(12))])
        return [rows[row].tobytes() for row in range(12)]

    together = prefilled(engine, text, 192)
    expected = bits(together)
    engine.free(together)
    singles = [engine.allocate(64) for _ in range(8)]
    for gap in (1, 3, 5):
        engine.free(singles[gap])
    scattered = prefilled(engine, text, 192)
    assert not scattered.is_contiguous  # type: ignore[attr-defined]
    assert bits(scattered) == expected


# --- exact numerics ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bits_do_not_depend_on_chunks_trees_or_neighbours(
    dtype: Any, folders: dict[str, Path]
) -> None:
    engine = HFEngine.load(folders["llama"], dtype=dtype, numerics="exact", threads=2)
    assert [differing_rows(engine, seed) for seed in range(2)] == [0, 0]
    assert engine.usage.used == 0


@pytest.mark.parametrize("weights", ["auto", "float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_bits_do_not_depend_on_what_is_beside_them_when_weights_are_quantized(
    weights: Any, family: str, folders: dict[str, Path]
) -> None:
    engine = HFEngine.load(folders[family], weights=weights, numerics="exact", threads=2)
    assert differing_rows(engine) == 0


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("seeds", [1, 10], ids=["one", "many"])
def test_bits_of_the_real_model_do_not_depend_on_what_is_beside_them(seeds: int) -> None:
    engine = HFEngine.load(ensure_default_target(), numerics="exact", threads=2)
    assert [differing_rows(engine, seed) for seed in range(seeds)] == [0] * seeds


@pytest.mark.slow
@pytest.mark.model
def test_the_check_of_bits_finds_numerics_that_are_not_exact() -> None:
    engine = HFEngine.load(ensure_default_target(), numerics="fast", threads=2)
    assert differing_rows(engine) > 0


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "parents", "kind", "message"),
    [
        ([VOCAB], [-1], InvalidRequest, "token 128 is unknown; the vocabulary has 128"),
        ([1, 2], [-1, 1], InvalidTree, "row 1 has parent 1; a parent precedes its row"),
    ],
)
def test_a_bad_segment_leaves_everything_as_it_was(
    engine: HFEngine, tokens: list[int], parents: list[int], kind: type[Exception], message: str
) -> None:
    good, bad = engine.allocate(64), engine.allocate(64)
    segments = [Segment(good, [1], [-1], [0]), Segment(bad, tokens, parents, [0])]
    with pytest.raises(kind, match=message):
        engine.forward(segments)
    assert (good.num_rows, bad.num_rows) == (0, 0)
    engine.free(good)
    engine.free(bad)


def test_a_position_beyond_the_context_is_refused(engine: HFEngine) -> None:
    sequence = engine.allocate(CONTEXT + 64)
    tokens = [1] * (CONTEXT + 1)
    with pytest.raises(InvalidRequest, match="position 1024 is beyond the context of 1024 tokens"):
        engine.forward([Segment.chain(sequence, tokens, [])])
    engine.free(sequence)


def test_allocation_is_refused_with_the_numbers_when_the_pool_is_full(engine: HFEngine) -> None:
    with pytest.raises(Overloaded, match=r"257 .* 256"):
        engine.allocate(257 * 64)


def test_a_missing_model_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="/nowhere"):
        HFEngine.load(Path("/nowhere/model"))
