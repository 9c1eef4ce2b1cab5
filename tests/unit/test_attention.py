"""Tree attention beside its definition, and the bits that `exact` promises."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from treecast.kernels.exact import NORM_COLUMNS, ExactAttention
from treecast.kernels.fast import FastAttention
from treecast.kernels.grouping import BLOCK, MAX_TAIL, _Splitter, group_rows, leading_blocks
from treecast.kernels.oracle import OracleAttention
from treecast.kernels.plan import LayerAttention, SegmentLayout
from treecast.kernels.scores import PLAIN, ScoreRule

HEADS, KV_HEADS, DIM = 4, 2, 32
PLACES = 5120
SCALING = DIM**-0.5


@dataclass(frozen=True)
class Text:
    """Queries, keys and values of a text's positions: what a layer would compute of its tokens."""

    query: Tensor  # [query heads, positions, dim]
    key: Tensor  # [KV heads, positions, dim]
    value: Tensor  # [KV heads, positions, dim]

    @classmethod
    def random(cls, positions: int, seed: int = 0) -> Text:
        generator = torch.Generator().manual_seed(seed)
        return cls(
            *(
                torch.randn(heads, positions, DIM, generator=generator)
                for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
        )

    def rows(self, positions: Sequence[int]) -> Text:
        index = list(positions)
        return Text(self.query[:, index], self.key[:, index], self.value[:, index])

    def pool(self, places: Sequence[int], norm_columns: int) -> tuple[Tensor, Tensor]:
        """A pool of stray numbers with the first positions at the first places given."""
        generator = torch.Generator().manual_seed(99)
        keys = torch.randn(KV_HEADS, PLACES, DIM, generator=generator)
        values = torch.randn(KV_HEADS, PLACES, DIM + norm_columns, generator=generator)
        committed = list(places)
        keys[:, committed] = self.key[:, : len(committed)]
        values[:, committed, :DIM] = self.value[:, : len(committed)]
        values[:, committed, DIM:] = 1
        return keys, values


def join(*texts: Text) -> Text:
    return Text(
        torch.cat([text.query for text in texts], 1),
        torch.cat([text.key for text in texts], 1),
        torch.cat([text.value for text in texts], 1),
    )


def layout_of(
    length: int, parents: Sequence[int], num_rows: int | None = None, first_place: int = 128
) -> SegmentLayout:
    slots = length + len(parents)
    places = range(first_place, first_place + slots)
    return SegmentLayout(0, num_rows or len(parents), length, parents, first_place, places)


def scattered(layout: SegmentLayout) -> SegmentLayout:
    """The same segment, its pages in reverse order and apart."""
    pages = range(2 * (layout.num_slots // BLOCK), -1, -2)
    places = [pages[slot // BLOCK] * BLOCK + slot % BLOCK for slot in range(layout.num_slots)]
    return SegmentLayout(0, layout.num_rows, layout.length, layout.parents, None, places)


def kernel_of(numerics: str, layouts: Sequence[SegmentLayout]) -> LayerAttention:
    if numerics == "exact":
        return ExactAttention(layouts)
    if numerics == "fast":
        return FastAttention(layouts, torch.float32, torch.device("cpu"))
    return OracleAttention(layouts)


def attend(
    numerics: str, layout: SegmentLayout, text: Text, rows: Text, rule: ScoreRule = PLAIN
) -> Tensor:  # [rows, query heads, dim]
    """One layer's attention: `text` fills the slots that are there, `rows` are the new ones."""
    columns = NORM_COLUMNS if numerics == "exact" else 0
    keys, values = text.pool(layout.places[: layout.first_new_slot], columns)
    out = torch.full((layout.num_rows, HEADS, DIM), torch.nan)
    kernel = kernel_of(numerics, [layout])
    kernel(rows.query, rows.key, rows.value, keys, values, SCALING, out, rule)
    return out


def random_parents(count: int, seed: int) -> list[int]:
    """A tree of that many rows; deep and bushy parts both occur."""
    rng = random.Random(seed)
    return [rng.choice([row - 1, rng.randint(-1, row - 1)]) if row else -1 for row in range(count)]


COMB = [-1, *range(299), *range(40)]
"""A chain of 300 rows with a tooth of one row at each of its first 40."""

TWO_CHAINS = [-1, -1, *range(498)]
"""Two branches of 250 rows, their rows by turns: too deep for their keys to share a product."""

SHAPES = {
    "a lone row": (77, [-1]),
    "the first row": (0, [-1]),
    "a chain": (30, [-1, *range(99)]),
    "siblings only": (64, [-1] * 24),
    "siblings at the end of a block": (191, [-1, -1, 0, 1, 2]),
    "a bush": (180, random_parents(40, 1)),
    "the largest tree": (63, random_parents(256, 2)),
    "a wide tree": (130, [-1, *random.Random(3).choices(range(1), k=255)]),
    "a comb": (10, COMB),
    "two chains": (5, TWO_CHAINS),
    "a long text": (2100, random_parents(24, 4)),
}


# --- against the definition -------------------------------------------------------------------


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_what_the_definition_says(numerics: str, shape: str) -> None:
    length, parents = SHAPES[shape]
    layout, text = layout_of(length, parents), Text.random(length)
    rows = Text.random(len(parents), seed=1)
    found = attend(numerics, layout, text, rows)
    torch.testing.assert_close(found, attend("oracle", layout, text, rows), atol=2e-6, rtol=0)


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_attention_differs_when_one_ancestor_is_hidden(
    numerics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    layout, text = layout_of(20, [-1, 0, 1, 1, 3]), Text.random(20)
    rows, honest = Text.random(5, seed=1), SegmentLayout.visible
    expected = attend("oracle", layout, text, rows)

    def one_bit_wrong(layout: SegmentLayout) -> NDArray[np.bool_]:
        visible = honest(layout)
        visible[4, 1] = not visible[4, 1]
        return visible

    monkeypatch.setattr(SegmentLayout, "visible", one_bit_wrong)
    found = attend(numerics, layout, text, rows)
    assert torch.allclose(found[:4], expected[:4], atol=2e-6)
    assert (found[4] - expected[4]).abs().max() > 0.01


@pytest.mark.parametrize("numerics", ["exact", "fast", "oracle"])
def test_attention_is_the_same_when_pages_are_scattered(numerics: str) -> None:
    layout, text = layout_of(150, random_parents(30, 5)), Text.random(150)
    rows = Text.random(30, seed=1)
    together = attend(numerics, layout, text, rows)
    apart = attend(numerics, scattered(layout), text, rows)
    assert torch.equal(together, apart)


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_rows_join_a_tree_that_is_there(numerics: str) -> None:
    parents = random_parents(50, 6)
    text, rows = Text.random(90), Text.random(50, seed=1)
    at_once = attend("oracle", layout_of(90, parents), text, rows)
    there = join(text, rows.rows(range(20)))
    later = attend(numerics, layout_of(90, parents, num_rows=30), there, rows.rows(range(20, 50)))
    torch.testing.assert_close(later, at_once[20:], atol=2e-6, rtol=0)


# --- bits -------------------------------------------------------------------------------------


def alone(text: Text, position: int, rule: ScoreRule = PLAIN) -> Tensor:
    """[1, query heads, dim] a position computed with nothing beside it."""
    return attend("exact", layout_of(position, [-1]), text, text.rows([position]), rule)


def differing_positions(
    text: Text, layout: SegmentLayout, path: Sequence[int], rule: ScoreRule = PLAIN
) -> list[int]:
    """The text's next positions, put at rows `path` of a tree: those whose bits are not theirs."""
    begin = layout.length
    rows = Text.random(len(layout.parents), seed=2)
    for i, row in enumerate(path):
        for part, whole in (
            (rows.query, text.query),
            (rows.key, text.key),
            (rows.value, text.value),
        ):
            part[:, row] = whole[:, begin + i]
    found = attend("exact", layout, text, rows, rule)
    return [
        begin + i
        for i, row in enumerate(path)
        if not torch.equal(found[row], alone(text, begin + i, rule)[0])
    ]


def path_to(row: int, parents: Sequence[int]) -> list[int]:
    path: list[int] = []
    while row >= 0:
        path.append(row)
        row = parents[row]
    return path[::-1]


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_of_a_path_do_not_depend_on_the_tree(shape: str) -> None:
    length, parents = SHAPES[shape]
    deepest = max(range(len(parents)), key=lambda row: len(path_to(row, parents)))
    for row in {deepest, len(parents) - 1}:
        path = path_to(row, parents)
        text = Text.random(length + len(path))
        assert differing_positions(text, layout_of(length, parents), path) == []


@pytest.mark.parametrize("size", [1, 2, 7, 64, 100, 333, 1200])
def test_bits_do_not_depend_on_the_chunks_of_a_prompt(size: int) -> None:
    text = Text.random(1200)
    step = max(1, size // 3)
    for begin in (0, 50, 500, 1000):
        chain = range(min(size, 1200 - begin))
        found = attend(
            "exact",
            layout_of(begin, range(-1, len(chain) - 1)),
            text,
            text.rows(range(begin, begin + len(chain))),
        )
        for i in chain[::step]:
            assert torch.equal(found[i], alone(text, begin + i)[0]), (begin, i)


def test_bits_do_not_depend_on_whether_a_second_thread_helps() -> None:
    text, rows = Text.random(700), Text.random(200, seed=1)
    layout = layout_of(700, random_parents(200, 7))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(attend("exact", layout, text, rows))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_bits_differ_when_a_key_of_the_path_is_another() -> None:
    """The negative control: the comparison sees one changed value."""
    parents = random_parents(40, 1)
    path = path_to(39, parents)
    text = Text.random(180 + len(path))
    assert differing_positions(text, layout_of(180, parents), path) == []
    assert differing_positions(text, layout_of(180, parents), [*path[:-2], path[-1], path[-2]])


# --- rules for scores -------------------------------------------------------------------------


def _slopes(positions: Tensor) -> Tensor:
    return torch.tensor([0.5, 0.25, 0.125, 0.3])[:, None] * positions


RULES = {
    "a cap": ScoreRule(softcap=0.7),
    "a window of one": ScoreRule(window=1),
    "a window": ScoreRule(window=50),
    "a window of blocks": ScoreRule(window=128),
    "biases": ScoreRule(bias=_slopes),
    "sinks": ScoreRule(sinks=torch.tensor([0.5, -1.0, 6.0, 0.0])),
    "all of them": ScoreRule(0.7, 70, _slopes, torch.tensor([0.5, -1.0, 2.0, 0.0])),
}
RULED_SHAPES = ("a lone row", "siblings at the end of a block", "a bush")


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("rule", RULES)
def test_ruled_attention_is_what_the_definition_says(numerics: str, rule: str) -> None:
    for shape in RULED_SHAPES:
        length, parents = SHAPES[shape]
        layout, text = layout_of(length, parents), Text.random(length)
        rows = Text.random(len(parents), seed=1)
        expected = attend("oracle", layout, text, rows, RULES[rule])
        for laid in (layout, scattered(layout)):
            found = attend(numerics, laid, text, rows, RULES[rule])
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_rules_change_what_comes_out(rule: str) -> None:
    """The negative control of the comparison above."""
    length, parents = SHAPES["a bush"]
    layout, text = layout_of(length, parents), Text.random(length)
    rows = Text.random(len(parents), seed=1)
    plain, ruled = (attend("oracle", layout, text, rows, r) for r in (PLAIN, RULES[rule]))
    assert (plain - ruled).abs().max() > 0.01


@pytest.mark.parametrize("rule", RULES)
def test_bits_of_a_path_do_not_depend_on_the_tree_under_a_rule(rule: str) -> None:
    length, parents = SHAPES["two chains" if rule == "all of them" else "a bush"]
    deepest = max(range(len(parents)), key=lambda row: len(path_to(row, parents)))
    path = path_to(deepest, parents)
    text = Text.random(length + len(path))
    assert differing_positions(text, layout_of(length, parents), path, RULES[rule]) == []


def test_blocks_before_the_window_are_left_out() -> None:
    (group,) = group_rows(layout_of(1000, [-1, 0]))
    narrow = group.within(100)
    assert (narrow.slots[0], narrow.positions[0]) == (896, 896)
    assert narrow.visible.sum(1).tolist() == [100, 100]


# --- groups -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_is_in_one_group_with_all_that_it_sees(shape: str) -> None:
    length, parents = SHAPES[shape]
    layout = layout_of(length, parents)
    groups = group_rows(layout)
    assert sorted(row for group in groups for row in group.rows) == list(range(len(parents)))
    for group in groups:
        assert len(group.slots) - group.num_blocks * BLOCK <= MAX_TAIL
        for row, visible in zip(group.rows, group.visible, strict=True):
            seen = [slot for slot, sees in zip(group.slots, visible, strict=True) if sees]
            assert seen == layout.path_slots(row)


@pytest.mark.parametrize("seed", range(8))
def test_groups_are_those_without_whole_blocks_before_when_a_text_is_long(seed: int) -> None:
    """The oracle has less than a block of committed text, of which nothing is left out."""
    rng = random.Random(seed)
    length, behind = rng.randrange(BLOCK), BLOCK * rng.randint(1, 30)
    parents = random_parents(rng.randint(MAX_TAIL, 400), seed)
    num_rows = rng.randint(len(parents) // 2, len(parents))
    long = group_rows(layout_of(behind + length, parents, num_rows))
    short = group_rows(layout_of(length, parents, num_rows))
    assert len(long) == len(short) > 1
    for one, oracle in zip(long, short, strict=True):
        assert one.rows == oracle.rows
        assert one.slots == [*range(behind), *(slot + behind for slot in oracle.slots)]
        assert one.positions.tolist() == layout_positions(behind, oracle.positions)
        assert one.visible[:, :behind].all()
        assert (one.visible[:, behind:] == oracle.visible).all()


def layout_positions(behind: int, positions: NDArray[np.int64]) -> list[int]:
    return [*range(behind), *(positions + behind).tolist()]


def test_paths_are_as_short_as_without_committed_text_when_rows_are_split() -> None:
    layout = layout_of(2100, random_parents(256, 2))
    splitter = _Splitter(layout, layout.positions())
    assert max(map(len, splitter._paths.values())) < BLOCK + 256


def test_a_segment_is_not_split_when_its_keys_fit_one_product() -> None:
    assert len(group_rows(layout_of(64, random_parents(MAX_TAIL, 8)))) == 1
    assert len(group_rows(layout_of(64, [-1] * (MAX_TAIL + 1)))) == 2
    assert len(group_rows(layout_of(5, TWO_CHAINS))) == 2


@pytest.mark.parametrize(
    ("positions", "blocks"),
    [
        (range(0), 0),
        (range(63), 0),
        (range(64), 1),
        (range(200), 3),
        ([*range(64), 63], 0),  # a sibling of the block's last key: one sum for both
        ([*range(130), 129, 130], 2),
        ([*range(130), 127], 1),
    ],
)
def test_leading_blocks_are_counted_when_whole_and_alone(
    positions: Sequence[int], blocks: int
) -> None:
    assert leading_blocks(np.array(positions, dtype=np.int64)) == blocks
