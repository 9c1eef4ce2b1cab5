"""The report on trees: what is counted, worked out by hand, and what is written of it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from treecast.bench.study.answers import (
    GREEDY,
    STOCHASTIC,
    Answer,
    AnswerFile,
    Question,
    in_batches,
    record_answers,
)
from treecast.bench.study.bed import Bed, StudySettings
from treecast.bench.study.folder import Finding, Folder, Origin
from treecast.bench.study.measure import measure
from treecast.bench.study.render import render
from treecast.bench.study.replaying import count_hits, first_guesses, replay
from treecast.bench.study.results import (
    Estimate,
    Guesses,
    Measurements,
    Reliability,
    StepTime,
    Trial,
)
from treecast.bench.study.sections import CHAIN, TREE, Section, trial_of
from treecast.bench.study.tables import best_tokens, markdown
from treecast.bench.study.timing import BATCHES, ROUNDS, parents_of, shape_times
from treecast.cli.app import app
from treecast.decoding.local import Generation, generate
from treecast.drafting.growth import ExpansionVector
from treecast.drafting.merge import MergedDrafter
from treecast.drafting.ngram import NgramDrafter
from treecast.drafting.ssm import SSMDrafter
from treecast.engine.toy import ToyEngine
from treecast.errors import InvalidRequest
from treecast.sampling.params import Proposal, SpeculationParams

SERVED = SpeculationParams()


def answer(prompt: tuple[int, ...], tokens: tuple[int, ...], name: str = "q") -> Answer:
    return Answer(Question(name, "c", prompt), GREEDY, tokens)


def test_accepted_lengths_are_counted_when_a_lookup_drafts():
    # After "1 2 3 1" the lookup knows 2 3 1 2 ..: with 2 nodes each step holds two tokens and the
    # bonus; the last of 7 tokens is a bonus, for which no tree is verified.
    answers = [answer((1, 2, 3, 1), (2, 3, 1, 2, 3, 1, 2)), answer((1,), (2, 3), "r")]
    drafter = MergedDrafter([NgramDrafter()])
    repeated, plain = replay(drafter, answers, SERVED, 2, "lookup")
    assert repeated == Trial("lookup", "greedy", "q", "c", 4, (1, 0, 2))
    assert (repeated.tokens, repeated.steps, repeated.tokens_per_step) == (7, 3, 7 / 3)
    # Nothing repeats: a token a step.
    assert (plain.steps_by_accepted, plain.nodes, plain.question) == ((2,), 0, "r")


def test_success_is_counted_when_guesses_are_ranked():
    # "1" was followed by 2, then by 3: the later one is the first guess. At the second token
    # nothing is known of "2 5", and "5" was never seen.
    answers = [answer((1, 2, 1, 3, 1), (2, 5, 1))]
    found = first_guesses(MergedDrafter([NgramDrafter()]), answers, SERVED)
    assert found[0][0] == [3, 2]
    assert 5 not in found[0][1]
    assert found[0][2] == []
    (row,) = count_hits([found], answers, "greedy", "ngram")
    assert (row.num_tokens, row.hits) == (3, (0, 1, 1, 1, 1))
    assert (row.rate(1), row.rate(2)) == (0, 1 / 3)


def test_a_union_counts_distinct_guesses_when_proposers_agree():
    answers = [answer((1,), (7, 8))]
    sources = [[[[7, 5], [1]]], [[[7, 6], [8]]]]
    (row,) = count_hits(sources, answers, "greedy", "union")
    assert row.hits == (2, 2, 2, 2, 2)
    assert row.sizes == (3, 5, 5, 5, 5)  # {7} {1, 8}; {7, 5, 6} {1, 8}


@pytest.mark.parametrize("decoding", [GREEDY, STOCHASTIC])
@pytest.mark.parametrize("proposal", list(Proposal))
def test_replay_takes_what_the_whole_loop_takes_when_it_holds_the_answers(
    decoding, proposal, monkeypatch
):
    target, question = ToyEngine(vocab_size=11), Question("q", "c", (1, 2, 3))
    (said,) = record_answers(target, [question], decoding, 24)
    growth = SpeculationParams(proposal=proposal, growth="<2,1,1>")

    def drafter() -> MergedDrafter:
        return MergedDrafter([SSMDrafter(ToyEngine(vocab_size=11), "<2,1,1>"), NgramDrafter()])

    (trial,) = replay(drafter(), [said], growth, 4, "tree")
    done = generate(
        target, (1, 2, 3), said.sampling, said.noise_key, drafter(), 4, speculation=growth
    )
    assert tuple(done.tokens) == said.tokens
    whole = trial_of(done, question, "tree")
    assert replace(whole, decoding=decoding.name) == trial
    # The control: other noise, another answer, another number of steps.
    monkeypatch.setattr("treecast.bench.study.answers.NOISE", 1)
    (wrong,) = replay(drafter(), [said], growth, 4, "tree")
    if decoding is STOCHASTIC and proposal is Proposal.COUPLED:
        assert wrong.steps > trial.steps


def test_many_answers_are_drafted_side_by_side_when_prompts_are_long():
    target = ToyEngine(vocab_size=11)
    questions = [Question(f"{n}", "c", (n % 11, *range(1, 9)) * 40) for n in range(18)]
    answers = record_answers(target, questions, GREEDY, 6)
    engine = ToyEngine(vocab_size=11, pool_tokens=32768)
    together = replay(MergedDrafter([SSMDrafter(engine, "<1,1>")]), answers, SERVED, 2, "chain")
    assert [trial.steps_by_accepted for trial in together] == [(0, 0, 2)] * 18
    assert engine.usage.used == 0


@pytest.mark.parametrize("decoding", [GREEDY, STOCHASTIC])
def test_answers_are_those_of_the_whole_loop_when_many_are_recorded_at_once(decoding):
    target = ToyEngine(vocab_size=11)
    questions = [Question(f"{n}", "c", tuple(range(n + 1))) for n in range(9)]
    answers = record_answers(target, questions, decoding, 24)
    for said in answers:
        alone = generate(target, said.question.token_ids, decoding.sampling(24), said.noise_key)
        assert list(said.tokens) == alone.tokens
    assert len({said.tokens for said in answers}) > 1
    assert target.usage.used == 0


def test_questions_are_asked_together_as_far_as_the_pool_goes():
    questions = [Question(f"{n}", "c", (1,) * 100) for n in range(40)]
    sizes = [len(batch) for batch in in_batches(questions, 28, pool_tokens=128 * 10)]
    assert sizes == [10] * 4
    assert [len(batch) for batch in in_batches(questions, 28, 2**20)] == [16, 16, 8]
    assert [len(batch) for batch in in_batches(questions[:2], 29, 64)] == [1, 1]


def test_steps_are_counted_by_length_when_a_text_was_generated():
    done = Generation(steps=5, drafted=9, accepted_by_depth=[3, 1, 0])
    trial = trial_of(done, Question("q", "c", (1,)), "mss / iid")
    assert trial.steps_by_accepted == (2, 2, 1)
    assert trial.tokens == 2 + 4 + 3


def test_the_error_is_that_of_the_mean_when_there_are_several_prompts():
    assert Estimate.of([1.0, 2.0, 3.0]) == Estimate(2.0, pytest.approx(1 / 3**0.5), 3)
    assert str(Estimate.of([1.0, 2.0, 3.0])) == "2.00 ± 0.58"
    assert str(Estimate.of([1.5])) == "1.50"


def test_a_shape_is_laid_out_level_by_level():
    assert parents_of(ExpansionVector((2, 1, 2))) == [-1, -1, 0, 1, 2, 2, 3, 3]


def test_sequences_compute_shared_nodes_again_when_a_tree_does_not():
    engine, ticks = ToyEngine(), iter(range(10_000))
    times = shape_times(engine, TREE, CHAIN, clock=lambda: next(ticks) * 0.002)
    rows = {time.setting: time.rows for time in times}
    assert rows == {"plain": 1, "chain": 9, "tree": 21, "sequences": 27}
    assert [time.batch for time in times[::4]] == list(BATCHES)
    assert [time.median_ms for time in times] == pytest.approx([2.0] * 16)
    assert engine.num_passes == max(BATCHES) + 16 * (ROUNDS + 1)
    assert engine.usage.used == 0


def toy_bed(folder, **settings) -> Bed:
    questions = [Question("a", "x", (1, 2, 3)), Question("b", "y", (4, 5))]
    return Bed(
        StudySettings(max_tokens=8, **settings),
        questions,
        folder,
        load_target=lambda _: ToyEngine(),
        load_drafts=lambda _: [ToyEngine()],
    )


def test_figures_of_other_weights_are_refused_though_their_names_are_the_same(tmp_path):
    measured = [Section.TIME]
    measure(toy_bed(tmp_path), Folder(tmp_path), measured, "treecast bench", lambda *_: None)
    tuned = toy_bed(tmp_path)
    tuned._load_drafts = lambda _: [Renamed(ToyEngine())]
    with pytest.raises(
        InvalidRequest, match=r"was measured with revisions .*'toy-97', 'toy-97'.* now .*'tuned'"
    ):
        measure(tuned, Folder(tmp_path), measured, "treecast bench", lambda *_: None)


class Renamed:
    """An engine of another revision."""

    def __init__(self, engine):
        self.info = replace(engine.info, revision="tuned")


def test_all_sections_are_measured_when_the_folder_is_empty(tmp_path):
    measure(toy_bed(tmp_path), Folder(tmp_path), list(Section), "treecast bench", lambda *_: None)
    page = render(Folder(tmp_path))
    answers = {file.name for file in tmp_path.glob("answers-*.jsonl.gz")}
    assert {name.rpartition("-")[0] for name in answers} == {"answers-greedy", "answers-stochastic"}
    assert {file.name for file in tmp_path.iterdir()} == {
        *answers,
        "report.md",
        *(f"{section.value}.{kind}" for section in Section for kind in ("json", "png")),
    }
    text = page.read_text()
    # A draft that is the target itself: always right at once; and 8 nodes below 8 tokens suffice.
    assert "| greedy | ssm | 1.00 ± 0.00 | 1.00 ± 0.00 |" in text
    assert "| `<1,1,1,1,1,1,1,1>` | 8.00 ± 0.00 | 8.00 ± 0.00 |" in text
    assert "| replay / coupled | 7.00 ± 0.00 | 8.00 ± 0.00 |" not in text  # depth 4
    assert "| mss / without_replacement |" in text
    for section in Section:
        png = (tmp_path / f"{section.value}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert len(png) < 100_000


def test_measuring_goes_on_with_what_is_missing_when_it_was_interrupted(tmp_path):
    sections = [Section.SUCCESS, Section.WIDTH, Section.CALIBRATION]
    shown: list[str] = []

    def interrupt(label: str, number: int, total: int) -> None:
        shown.append(label)
        if label.startswith("width") and number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(toy_bed(tmp_path), Folder(tmp_path), sections, "first", interrupt)
    assert [found.section for found in Folder(tmp_path).read()] == [Section.SUCCESS]
    first, shown = shown, []
    measure(
        toy_bed(tmp_path), Folder(tmp_path), sections, "second", lambda *said: shown.append(said[0])
    )
    assert sum(label.startswith("answers") for label in first) == 2
    assert {label.partition(":")[0] for label in shown} == {"width", "calibration"}
    found = Folder(tmp_path).read()
    assert [one.origin.command for one in found] == ["first", "second", "second"]


def test_an_answer_is_kept_when_the_next_one_is_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr("treecast.bench.study.answers.BATCH", 1)

    def interrupt(label: str, number: int, total: int) -> None:
        if number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(toy_bed(tmp_path), Folder(tmp_path), [Section.LAWS], "", interrupt)
    (left,) = toy_bed(tmp_path).missing(STOCHASTIC)
    assert [question.id for question in left] == ["b"]


def test_answers_are_asked_for_anew_when_another_target_or_length_gave_them(tmp_path):
    def num_missing(target: ToyEngine, max_tokens: int) -> int:
        settings = replace(bed.settings, max_tokens=max_tokens)
        asked = Bed(settings, bed.questions, tmp_path, load_target=lambda _: target)
        return sum(map(len, asked.missing(GREEDY)))

    bed = toy_bed(tmp_path)
    bed.record(bed.questions, GREEDY)
    assert num_missing(ToyEngine(), 8) == 0
    assert num_missing(ToyEngine(), 9) == 2
    assert num_missing(ToyEngine(vocab_size=64), 8) == 2


def test_answers_after_a_cut_are_kept_when_the_file_is_opened_again(tmp_path):
    said = [answer((1, 2), (3, 4), "a"), answer((5,), (6,), "b"), answer((7,), (8,), "c")]
    AnswerFile(tmp_path, GREEDY, "toy").add(said[:1])
    AnswerFile(tmp_path, GREEDY, "toy").add(said[1:2])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    AnswerFile(tmp_path, GREEDY, "toy").add(said[2:])
    known = AnswerFile(tmp_path, GREEDY, "toy")
    assert known.missing([one.question for one in said]) == [said[1].question]
    file.write_bytes(file.read_bytes()[:4])
    assert len(AnswerFile(tmp_path, GREEDY, "toy").missing([one.question for one in said])) == 3


def test_a_folder_is_refused_when_it_holds_figures_of_other_settings(tmp_path):
    measure(toy_bed(tmp_path), Folder(tmp_path), [Section.SUCCESS], "", lambda *_: None)
    with pytest.raises(InvalidRequest, match=r"success.json was measured with max_nodes 24, .* 16"):
        measure(
            toy_bed(tmp_path, max_nodes=16), Folder(tmp_path), [Section.WIDTH], "", lambda *_: None
        )


def test_a_section_file_is_refused_by_name_when_it_is_none(tmp_path):
    (tmp_path / "width.json").write_text('{"origin": 1}')
    with pytest.raises(InvalidRequest, match=r"width.json is no section of a report"):
        Folder(tmp_path).read()


ORIGIN = Origin({"max_nodes": 24, "drafters": ["ssm", "ngram"]}, {"cores": 2}, {"a": "1"}, "c", 3.2)


def trial(setting: str, question: str, lengths: tuple[int, ...], decoding: str) -> Trial:
    return Trial(setting, decoding, question, f"kind {question}", 10, lengths)


def page_of(section: Section, **measured) -> list[str]:
    """The lines from the section's table on."""
    finding = Finding(section, ORIGIN, Measurements(**measured))
    text = markdown([finding], {section: "plot.png"})
    assert "![" in text
    assert "| settings | max_nodes 24, drafters ssm+ngram |" in text
    body = text.partition("\n## ")[2].splitlines()
    return [line for line in body if line.startswith("|")]


def test_best_tree_is_worked_out_by_hand_when_a_guess_is_right_half_the_time():
    def guessed(hits: tuple[int, ...], sizes: tuple[int, ...]) -> Guesses:
        return Guesses("greedy", "union", "q", "c", 4, hits, sizes)

    chain = guessed((2,) * 5, (4, 8, 12, 16, 20))
    assert best_tokens(chain, 2) == pytest.approx(1 + 1 / 2 + 1 / 4)
    # Two guesses at once, of which one is right half the time: a quarter each.
    pairs = guessed((2,) * 5, (8, 16, 24, 32, 40))
    assert best_tokens(pairs, 2) == pytest.approx(1 + 1 / 4 + 1 / 4)
    assert best_tokens(guessed((0,) * 5, (0,) * 5), 2) == 1


def test_success_is_a_row_per_proposer_when_it_is_shown():
    hits = Guesses("greedy", "union", "q", "c", 4, (1, 2, 2, 3, 4), (4, 8, 10, 12, 14))
    page = page_of(Section.SUCCESS, guesses=(hits, replace(hits, hits=(2, 2, 2, 3, 4))))
    assert [line.partition(" ")[2].partition(" ")[0] for line in page[5:]] == ["---", "c", "all"]
    assert page[:4] == [
        "| decoding | proposer | top 1 | top 2 | top 3 | top 4 | top 5 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| greedy | union | 0.38 ± 0.12 | 0.50 ± 0.00 | 0.50 ± 0.00 | 0.75 ± 0.00 | 1.00 ± 0.00 |",
        "| greedy | distinct guesses of the union | 1.00 ± 0.00 | 2.00 ± 0.00 | 2.50 ± 0.00 "
        "| 3.00 ± 0.00 | 3.50 ± 0.00 |",
    ]


def test_widths_are_rows_and_decodings_columns_when_they_are_shown():
    trials = (
        trial("<1,1>", "p", (2, 2), "greedy"),
        trial("<1,1>", "q", (0, 2), "greedy"),
        trial("<1,1>", "p", (4,), "stochastic"),
    )
    assert page_of(Section.WIDTH, trials=trials)[2:] == ["| `<1,1>` | 1.75 ± 0.25 | 1.00 |"]


def test_laws_are_compared_prompt_by_prompt_when_they_are_shown():
    trials = [trial("replay / coupled", q, n, "stochastic") for q, n in zip("pq", [(1, 1), (0, 2)])]  # noqa: B905
    trials += [trial("mss / iid", q, n, "stochastic") for q, n in zip("pq", [(2, 0), (1, 1)])]  # noqa: B905
    assert page_of(Section.LAWS, trials=tuple(trials))[2:] == [
        "| replay / coupled | 0.75 ± 0.25 | 1.75 ± 0.25 |  | 5.0 |",
        "| mss / iid | 0.25 ± 0.25 | 1.25 ± 0.25 | -0.50 ± 0.00 | 5.0 |",
    ]


def test_lengths_and_categories_are_listed_when_they_are_shown():
    trials = (
        trial("as served", "p", (2, 2), "greedy"),
        trial("as served", "q", (1, 0, 1), "greedy"),
    )
    assert page_of(Section.LENGTH, trials=trials) == [
        "| nodes accepted | share of steps, greedy |",
        "| --- | --- |",
        "| 0 | 0.50 ± 0.00 |",
        "| 1 | 0.25 ± 0.25 |",
        "| 2 | 0.25 ± 0.25 |",
        "| category | prompts | greedy |",
        "| --- | --- | --- |",
        "| kind p | 1 | 1.50 |",
        "| kind q | 1 | 2.00 |",
        "| all prompts | 2 | 1.75 ± 0.25 |",
        "| all steps |  | 1.67 |",
    ]


def test_times_are_medians_with_quartiles_when_they_are_shown():
    times = (
        StepTime("plain", 1, 1, 10.0, 9.5, 11.0),
        StepTime("<2>", 1, 3, 12.0, 12.0, 12.5),
        StepTime("plain", 2, 1, 14.0, 13.0, 15.0),
        StepTime("<2>", 2, 3, 20.0, 19.0, 21.0),
    )
    assert page_of(Section.TIME, times=times) == [
        "| tree | rows of each | 1 request | 2 requests |",
        "| --- | --- | --- | --- |",
        "| plain | 1 | 10.0 (9.5-11.0) | 14.0 (13.0-15.0) |",
        "| `<2>` | 3 | 12.0 (12.0-12.5) | 20.0 (19.0-21.0) |",
    ]


def test_sequences_hold_what_the_tree_holds_when_shapes_are_shown():
    trials = (trial("tree", "p", (0, 2), "greedy"), trial("chain", "p", (1, 1), "greedy"))
    times = tuple(
        StepTime(name, 2, rows, 30.0, 29.0, 31.0)
        for name, rows in (("plain", 1), ("chain", 9), ("tree", 21), ("sequences", 27))
    )
    assert page_of(Section.SHAPE, trials=trials, times=times)[2:] == [
        "| plain | 2 | 2 | 30.0 (29.0-31.0) | 1.00 | 15.0 |",
        "| chain | 2 | 18 | 30.0 (29.0-31.0) | 1.50 | 10.0 |",
        "| tree | 2 | 42 | 30.0 (29.0-31.0) | 2.00 | 7.5 |",
        "| sequences | 2 | 54 | 30.0 (29.0-31.0) | 2.00 | 7.5 |",
    ]


def test_reliability_is_a_row_per_bin_when_it_is_shown():
    rows = (Reliability("greedy", "ssm+ngram", 8, 0.5, 0.4, 0.375),)
    assert page_of(Section.CALIBRATION, reliability=rows)[2:] == [
        "| greedy | ssm+ngram | 8 | 0.500 | 0.400 | 0.375 |"
    ]


def test_findings_are_the_same_when_they_were_saved_and_read(tmp_path):
    measured = Measurements(trials=(trial("a", "p", (1, 2), "greedy"),))
    Folder(tmp_path).save(Finding(Section.LENGTH, ORIGIN, measured))
    (read,) = Folder(tmp_path).read()
    assert (read.section, read.measured) == (Section.LENGTH, measured)
    assert json.dumps(read.origin.settings) == json.dumps(ORIGIN.settings)


def bench(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["bench", "--report", "out", *arguments])
    assert result.exit_code == 2
    return result.stderr


def test_the_extra_is_named_when_matplotlib_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "not installed; run `pip install 'treecast[bench]'`" in bench()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--law", "mss"], "--report does not heed --law"),
        (["--weights", "int8"], "--report does not heed --weights"),
        (["--peer", "vllm=/x"], "--report does not heed --peer"),
        (["--peer-model", "vllm=/x"], "--report does not heed --peer-model"),
        (["--levels", "1"], "--report does not heed --levels"),
        (["--sections", "width,depth"], "--sections is 'width,depth'; known: success, width"),
        (["--speculators", "ngram"], "--speculators is 'ngram'; a report needs ssm"),
        (["--model", "m"], "--model and --draft go together"),
    ],
)
def test_a_report_is_refused_with_a_line_when_it_cannot_be_made(arguments, message):
    assert message in bench(*arguments)
