"""The toy engine: its model by hand, its rows against that model, its contract."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from treecast.drafting.base import DraftRequest
from treecast.engine.base import Engine, KVSequence, LogitRows, Segment
from treecast.engine.toy import ToyEngine, toy_logits
from treecast.errors import InvalidTree, Overloaded
from treecast.prefix import PAGE_TOKENS
from treecast.sampling.params import SamplingParams
from treecast.tree import ROOT, TokenTree

from .toy_drafter import ToyDrafter

VOCAB = 97


def test_toy_logits_are_as_worked_out_by_hand() -> None:
    # After 1, 2: 3*2 + 1 + 1 = 8 is favoured; S = 1*1 + 2*2 = 5, so the slope is (4 + 5) / 8.
    row = toy_logits([1, 2], VOCAB)
    assert row.dtype == np.float32
    assert (row[8], row[9], row[10], row[7]) == (0.0, -1.125, -2.25, -1.125 * 96)
    # After 1, 2, 8: 3*8 + 2 + 1 = 27; S = 5 + 3*8 = 29, 29 mod 8 = 5.
    assert toy_logits([1, 2, 8], VOCAB)[[27, 28]].tolist() == [0.0, -1.125]
    # After 50: 3*50 + 0 + 1 = 151 = 54 mod 97; S = 50, 50 mod 8 = 2.
    assert toy_logits([50], VOCAB)[[54, 55]].tolist() == [0.0, -0.75]


def test_toy_logits_differ_when_any_token_of_the_text_differs() -> None:
    assert (toy_logits([4, 5, 6, 7], VOCAB) != toy_logits([3, 5, 6, 7], VOCAB)).any()
    assert (toy_logits([5, 4, 6, 7], VOCAB) != toy_logits([4, 5, 6, 7], VOCAB)).any()


def tree_segment(sequence: KVSequence, root: int, tree: TokenTree) -> Segment:
    parents = [-1, *(0 if p == ROOT else p + 1 for p in tree.parents)]
    return Segment(sequence, [root, *tree.tokens], parents, range(len(parents)))


def random_tree(source: random.Random, num_nodes: int) -> TokenTree:
    tree = TokenTree()
    while len(tree) < num_nodes:
        parent, token = source.randrange(ROOT, len(tree)), source.randrange(VOCAB)
        if tree.child(parent, token) is None:
            tree.add(token, parent)
    return tree


def assert_rows_follow(rows: LogitRows, texts: Sequence[Sequence[int]]) -> None:
    assert len(rows) == len(texts)
    for row, text in enumerate(texts):
        assert rows[row].tolist() == toy_logits(text, VOCAB).tolist(), f"row {row}"


def prefilled(engine: Engine, tokens: Sequence[int], capacity: int = 400) -> KVSequence:
    sequence = engine.allocate(capacity)
    engine.forward([Segment.chain(sequence, tokens, wanted=())])
    engine.commit(sequence, range(len(tokens)))
    return sequence


def test_rows_equal_the_model_when_a_prompt_comes_in_chunks() -> None:
    engine, text = ToyEngine(), list(range(1, 90))
    sequence = engine.allocate(100)
    for start in range(0, 89, 30):
        chunk = text[start : start + 30]
        rows = engine.forward([Segment.chain(sequence, chunk, wanted=[0, len(chunk) - 1])])
        assert_rows_follow(rows[0], [text[: start + 1], text[: start + len(chunk)]])
        engine.commit(sequence, range(len(chunk)))
    assert (sequence.length, engine.num_passes, engine.num_rows) == (89, 3, 89)


def test_rows_equal_the_model_when_trees_are_random_and_packed() -> None:
    engine, source = ToyEngine(), random.Random(5)
    texts = [source.choices(range(VOCAB), k=20 + 50 * i) for i in range(3)]
    sequences = [prefilled(engine, text) for text in texts]
    trees = [random_tree(source, size) for size in (0, 17, 120)]
    segments = [tree_segment(s, 3, t) for s, t in zip(sequences, trees, strict=True)]
    for rows, text, tree in zip(engine.forward(segments), texts, trees, strict=True):
        paths = [tree.sequence(node) for node in range(ROOT, len(tree))]
        assert_rows_follow(rows, [[*text, 3, *path] for path in paths])


def test_rows_equal_the_model_when_a_tree_grows_in_several_passes() -> None:
    engine = ToyEngine()
    sequence = prefilled(engine, [9, 8, 7])
    engine.forward([Segment(sequence, [1, 2], [-1, -1], wanted=())])
    rows = engine.forward([Segment(sequence, [3, 4, 5], [1, 0, 2], wanted=[0, 2])])[0]
    assert_rows_follow(rows, [[9, 8, 7, 2, 3], [9, 8, 7, 2, 3, 5]])


@dataclass
class Live:
    """A sequence beside the text that it should hold."""

    sequence: KVSequence
    text: list[int]


def committed_rows_follow(engine: Engine, live: Live) -> None:
    """The next row depends on every committed token."""
    rows = engine.forward([Segment.chain(live.sequence, [5], wanted=[0])])[0]
    assert_rows_follow(rows, [[*live.text, 5]])
    engine.truncate(live.sequence, len(live.text))


def verify_a_tree(engine: Engine, live: Live, source: random.Random) -> None:
    """One step: a random tree, a random path of it committed, some rows below it kept."""
    root, tree = source.randrange(VOCAB), random_tree(source, source.randrange(40))
    engine.forward([tree_segment(live.sequence, root, tree)])
    node = source.randrange(ROOT, len(tree))
    depth = len(tree.path(node))
    below = [n for n in tree.descendants(node) if tree.depths[n] <= depth + 2]
    path = [0, *(step + 1 for step in tree.path(node))]
    engine.commit(live.sequence, path, keep=[n + 1 for n in below])
    live.text += [root, *tree.sequence(node)]
    for kept, n in enumerate(below[-2:], start=max(0, len(below) - 2)):
        rows = engine.forward([Segment(live.sequence, [6], [kept], wanted=[0])])[0]
        assert_rows_follow(rows, [[*live.text, *tree.sequence(n)[depth:], 6]])
    engine.truncate(live.sequence, len(live.text))


def test_pool_holds_every_text_when_sequences_fork_grow_and_end_at_random() -> None:
    source = random.Random(6)
    engine = ToyEngine(pool_tokens=64 * 40, context_tokens=4096)
    lives = [Live(prefilled(engine, [1, 2, 3], capacity=3), [1, 2, 3])]
    for _ in range(400):
        live = source.choice(lives)
        act = source.random()
        try:
            if act < 0.6 and len(live.text) < 500:
                engine.reserve(live.sequence, len(live.text) + 42)
                verify_a_tree(engine, live, source)
            elif act < 0.8 and len(lives) < 6:
                length = source.randrange(1, len(live.text) + 1)
                fork = engine.fork(live.sequence, length, length + 50)
                lives.append(Live(fork, live.text[:length]))
            elif act < 0.9 and len(lives) > 1:
                engine.free(live.sequence)
                lives.remove(live)
            else:
                live.text = live.text[: source.randrange(1, len(live.text) + 1)]
                engine.truncate(live.sequence, len(live.text))
                engine.trim(live.sequence)
        except Overloaded:
            engine.free(lives.pop(0).sequence)
            lives = lives or [Live(prefilled(engine, [7]), [7])]
        assert engine.usage.free + engine.usage.used == engine.usage.total
    for live in lives:
        committed_rows_follow(engine, live)
        engine.free(live.sequence)
    assert engine.usage.free == engine.usage.total


def test_rows_differ_from_the_model_when_the_wrong_branch_was_committed() -> None:
    engine = ToyEngine()
    sequence = prefilled(engine, [9, 8, 7])
    engine.forward([Segment(sequence, [1, 2], [-1, -1], wanted=())])
    engine.commit(sequence, [0])  # the text went on with 2
    with pytest.raises(AssertionError, match="row 0"):
        committed_rows_follow(engine, Live(sequence, [9, 8, 7, 2]))


def test_kept_rows_can_be_built_on_when_their_ancestors_were_committed() -> None:
    engine = ToyEngine()
    sequence = prefilled(engine, [9])
    engine.forward([Segment(sequence, [1, 2, 3, 4], [-1, 0, 0, 2], wanted=())])
    engine.commit(sequence, [0], keep=[2, 3])
    rows = engine.forward([Segment(sequence, [6], [1], wanted=[0])])[0]
    assert_rows_follow(rows, [[9, 1, 3, 4, 6]])


@pytest.mark.parametrize(
    ("tokens", "parents", "wanted", "message"),
    [
        ([], [], [], "0 tokens, 0 parents"),
        ([1, 2], [-1], [], "2 tokens, 1 parents"),
        ([97], [-1], [], r"\[97\]"),
        ([1, 2], [-1, 1], [], "row 1 has parent 1"),
        ([1], [-2], [], "row 0 has parent -2"),
        ([1, 2], [-1, 0], [1, 0], "do not ascend"),
        ([1, 2], [-1, 0], [2], "of 2"),
    ],
)
def test_forward_asserts_when_a_segment_breaks_the_contract(
    tokens: list[int], parents: list[int], wanted: list[int], message: str
) -> None:
    engine = ToyEngine(vocab_size=97)
    with pytest.raises(AssertionError, match=message):
        engine.forward([Segment(engine.allocate(10), tokens, parents, wanted)])


def test_forward_asserts_when_a_sequence_comes_twice_or_passes_the_context() -> None:
    engine = ToyEngine(context_tokens=4)
    sequence = prefilled(engine, [1, 2, 3])
    segment = Segment.chain(sequence, [4], wanted=())
    with pytest.raises(AssertionError, match="two segments of one sequence"):
        engine.forward([segment, segment])
    with pytest.raises(AssertionError, match="beyond the context"):
        engine.forward([Segment.chain(sequence, [4, 5], wanted=())])
    engine.forward([segment])


def test_commit_refuses_when_the_path_is_no_chain() -> None:
    engine = ToyEngine()
    sequence = prefilled(engine, [9])
    engine.forward([Segment(sequence, [1, 2, 3], [-1, -1, 0], wanted=())])
    with pytest.raises(InvalidTree):
        engine.commit(sequence, [0, 1])
    with pytest.raises(AssertionError):
        engine.commit(sequence, [3])
    with pytest.raises(AssertionError, match="without segments"):
        engine.forward([])


def test_allocate_is_refused_when_the_pool_is_full() -> None:
    engine = ToyEngine(pool_tokens=2 * PAGE_TOKENS)
    engine.allocate(PAGE_TOKENS + 1)
    with pytest.raises(Overloaded):
        engine.allocate(1)


def test_on_forward_sees_every_pass() -> None:
    passes: list[int] = []
    engine = ToyEngine(on_forward=lambda segments: passes.append(len(segments)))
    prefilled(engine, [1])
    assert passes == [1]


# --- the drafter ------------------------------------------------------------------------------

REQUEST = DraftRequest([1, 2], 2, SamplingParams(temperature=0), noise_key=0)


def test_toy_drafter_proposes_the_models_picks_when_it_never_errs() -> None:
    drafter = ToyDrafter(VOCAB, width=2, max_depth=3)
    drafter.open(4, REQUEST)
    tree = drafter.draft({4: 5})[4]
    assert tree.tokens == [8, 9, 27, 28, 90]
    assert tree.parents == [ROOT, ROOT, 0, 0, 2]
    drafter.commit(4, [8, 27])
    assert drafter.draft({4: 2})[4].tokens == [90, 91]


def test_toy_drafter_never_proposes_the_pick_when_it_always_errs() -> None:
    drafter = ToyDrafter(VOCAB, error_rate=1, max_depth=1)
    drafter.open(4, REQUEST)
    assert drafter.draft({4: 5, 9: 5}) == {4: TokenTree.build([9, 10], [ROOT, ROOT], [1, 0.5])}


def test_toy_drafter_refuses_when_it_is_full_and_forgets_what_is_closed() -> None:
    drafter = ToyDrafter(VOCAB, capacity=1)
    drafter.open(4, REQUEST)
    with pytest.raises(Overloaded):
        drafter.open(5, REQUEST)
    drafter.close(4)
    drafter.close(4)
    assert (drafter.num_sessions, drafter.draft({4: 5})) == (0, {})
