"""What the page of `treecast trace` is made of: places, times, sums and letters."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treecast.client.results import Result, RoundReport, Sample
from treecast.sampling.stops import FinishReason
from treecast.tracepage import render_page
from treecast.tracepage.drawing import Drawing, draw, fate
from treecast.tracepage.lettering import label, running_text, width_of
from treecast.tracepage.people import Cast
from treecast.tracepage.summary import Rate, summarise
from treecast.tracepage.timeline import Timeline
from treecast.tree import ROOT, TokenTree
from treecast.wire.frames import Usage
from treecast.wire.rounds import Round, RoundDraft

#   the -+- big (0) -+- red (2) --- fox (4)
#        |           +- old (3)
#        +- sea (1) --- air (5)
TEXTS = ("big", "sea", "red", "old", "fox", "air")
TREE = TokenTree.build(
    [10, 11, 12, 13, 14, 15],
    [ROOT, ROOT, 0, 0, 2, 1],
    [0.5, 0.25, 0.8, 0.1, 0.9, 0.3],
    [0b11, 0b01, 0b01, 0b10, 0b01, 0b100],
)
DRAFTS = (
    RoundDraft("s1", ("ssm",), 5, 9_000, 4_000),
    RoundDraft("s2", ("ssm", "ngram"), 3, 6_000, 100),
)
ROUND = Round(1, TREE, (0, 2), 99, DRAFTS, 5_000, 5_000, 10_000)
REPORT = RoundReport(ROUND, " big red hat", TEXTS, " hat")
FIRST = RoundReport(
    Round(0, TokenTree(), (), 7, (), 0, 1_000, 4_000, prompt_tokens=5), " the", (), " the"
)
ROUNDS = [FIRST.round, ROUND]


def result_of(*reports: RoundReport, text: str = " the big red hat") -> Result:
    tokens = tuple(token for report in reports for token in report.round.tokens)
    usage = Usage(output_tokens=len(tokens), steps=len(reports))
    sample = Sample(0, text, tokens, (), FinishReason.LENGTH, usage, rounds=reports)
    return Result("q1", 7, (1, 2), "toy", "r1", "f1", (sample,))


def test_each_node_has_its_fate_when_a_path_was_accepted():
    fates = [fate(REPORT, node) for node in range(6)]
    assert fates == ["accepted", "rejected", "accepted", "rejected", "rejected", "unreached"]


def test_the_output_is_the_first_row_when_a_tree_is_drawn():
    drawing = draw(REPORT, "the", Cast(ROUNDS))
    top = min(pill.y for pill in drawing.pills)
    first = sorted((p for p in drawing.pills if p.y == top), key=lambda pill: pill.x)
    assert [(p.text, p.kind) for p in first] == [
        ("the", "start"),
        ("big", "accepted"),
        ("red", "accepted"),
        ("·hat", "bonus"),
    ]


def test_a_node_shows_all_who_proposed_it_when_they_are_several():
    cast = Cast(ROUNDS)
    assert [each.name for each in cast.proposers] == ["ssm 1", "ssm 2", "ngram"]
    pills = {pill.text: pill for pill in draw(REPORT, "the", cast).pills}
    assert [colour for colour, _ in pills["big"].dots] == [0, 1]
    assert pills["big"].title == "big: accepted; proposed by ssm 1 and ssm 2 at 50%"
    assert [colour for colour, _ in pills["air"].dots] == [2]


@st.composite
def reports(draw_from: st.DrawFn) -> RoundReport:
    tree = TokenTree()
    for node in range(draw_from(st.integers(0, 40))):
        parent = draw_from(st.integers(ROOT, len(tree) - 1))
        if parent == ROOT or tree.depths[parent] < 8:
            tree.add(node, parent, 0.5, 1)
    accepted: list[int] = []
    if len(tree) and draw_from(st.booleans()):
        accepted = tree.path(draw_from(st.integers(0, len(tree) - 1)))
    draft = RoundDraft("s", ("ssm",), len(tree), 0, 1)
    texts = draw_from(st.tuples(*[st.text("abc", min_size=1, max_size=25)] * len(tree)))
    return RoundReport(Round(0, tree, tuple(accepted), 1, (draft,)), "x", texts, "b")


@settings(max_examples=40, deadline=None)
@given(reports())
def test_no_two_tokens_touch_when_any_tree_is_drawn(report: RoundReport):
    drawing = draw(report, "start", Cast([report.round]))
    assert len(drawing.pills) == len(report.round.tree) + 2
    assert inside(drawing)
    for at, one in enumerate(drawing.pills):
        for other in drawing.pills[at + 1 :]:
            apart_x = one.right <= other.x or other.right <= one.x
            apart_y = abs(one.y - other.y) >= one.height
            assert apart_x or apart_y


def inside(drawing: Drawing) -> bool:
    return all(
        0 <= pill.x < pill.right <= drawing.width and 0 <= pill.top < drawing.height
        for pill in drawing.pills
    )


def test_time_is_told_as_it_was_when_rounds_follow_one_another():
    timeline = Timeline(ROUNDS, Cast(ROUNDS))
    assert timeline.spans == [(0, 5_000), (5_000, 20_000)]
    lanes = {lane.name: lane.bars for lane in timeline.of_round(2)}
    # Round 2 takes 15 ms: the tree of s1 is drafted from 5 to 9 ms, the pass begins at 10.
    assert [(bar.kind, bar.left, bar.width) for bar in lanes["model"]] == [
        ("wait", 0, 33.333),
        ("verify", 33.333, 66.667),
    ]
    [draft] = lanes["ssm 1"]
    assert (draft.left, draft.width, draft.label) == (0, 26.667, "4.0 ms")
    assert [bar.round_number for bar in lanes["ssm 2 + ngram"]] == [2]


def test_time_goes_on_when_another_verifier_took_over():
    elsewhere = replace(ROUND, from_index=4, began_us=50, drafts=())
    timeline = Timeline([*ROUNDS, elsewhere], Cast(ROUNDS))
    assert timeline.spans[2] == (20_000, 35_000)


def test_a_tree_is_drafted_once_when_a_later_round_lives_on_it():
    later = replace(ROUND, from_index=4, began_us=20_000)
    lanes = Timeline([*ROUNDS, later], Cast(ROUNDS)).whole()
    assert [len(lane.bars) for lane in lanes if lane.name == "ssm 1"] == [1]


def test_sums_are_those_worked_out_by_hand():
    summary = summarise(ROUNDS, Cast(ROUNDS))
    assert (summary.num_tokens, summary.num_rounds, summary.tokens_per_round) == (4, 2, 2.0)
    assert summary.by_depth == (Rate("1", 1, 1), Rate("2", 1, 1), Rate("3", 0, 1))
    assert summary.by_proposer == (
        Rate("ssm 1", 2, 4, 0),
        Rate("ssm 2", 1, 2, 1),
        Rate("ngram", 0, 1, 2),
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "·the"),
        ("\n\n", "⏎⏎"),
        ("\u202eevil", "<202e>evil"),
        ("\x00\x7f", "<0><7f>"),
        ("", "[5]"),
        ("a" * 40, "a" * 17 + "…"),
        ("日本", "日本"),
    ],
)
def test_a_token_is_visible_when_labelled(text: str, shown: str):
    assert label(text, 5) == shown


def test_wide_letters_take_two_columns_when_measured():
    assert width_of("日本a\u0301") == 5
    assert running_text("a\n\u200b\x1b") == "a\n<200b><1b>"


def test_what_was_held_back_ends_the_text_when_the_output_is_whole():
    page = render_page("p", result_of(FIRST, REPORT, text=" the big red hat!!"), {})
    assert "> big red hat!!</a>" in page


def test_token_ids_stand_for_text_when_there_is_no_tokenizer():
    bare = [replace(report, text="", node_texts=(), bonus_text="") for report in (FIRST, REPORT)]
    page = render_page("tokens 1, 2", result_of(*bare, text=""), {})
    assert ">10 12 99 </a>" in page
    assert "[13]" in page


def test_the_page_says_so_when_rounds_are_missing():
    result = result_of(FIRST)
    [sample] = result.samples
    sample = replace(sample, usage=replace(sample.usage, steps=9))
    assert "Only the first 1 of 9 rounds" in render_page(
        "p", replace(result, samples=(sample,)), {}
    )


def test_the_page_stands_when_there_were_no_rounds():
    assert "nobody" in render_page("p", result_of(text=""), {})


def test_nothing_outside_is_referred_to_when_a_page_is_made():
    page = render_page("p", result_of(FIRST, REPORT), {})
    assert not re.search(r"""(src|href)=["'](?!#|data:,)""", page)
    assert not re.search(r"https?://|@import|url\(", page)


def _contrast(one: str, other: str) -> float:
    """WCAG 2.1's contrast ratio of two colours."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_words_stand_out_when_read_in_either_scheme(scheme: int):
    style = resources.files("treecast.tracepage").joinpath("page.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", blocks[0])) | dict(
        re.findall(r"--([\w-]+): (#\w+)", blocks[scheme])
    )
    pairs = [
        *(("ink", back) for back in ("paper", "card", "accept-soft", "bonus-soft")),
        *(("ink", f"h{heat}") for heat in range(6)),
        ("soft", "card"), ("soft", "paper"), ("accept", "card"), ("accept", "accept-soft"),
        ("bonus", "card"), ("on-strong", "accept"),
        *(("on-strong", f"p{colour}") for colour in range(8)),
    ]  # fmt: skip
    weak = [(f, b) for f, b in pairs if _contrast(colours[f], colours[b]) < 4.5]
    assert weak == []
