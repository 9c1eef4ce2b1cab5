"""The comparison's arithmetic, worked out by hand, and the demo against a scripted router."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tests.scripted_router import ScriptedRouter, delta, finished, play, started
from treecast.bench.compare import Spread, in_groups, interleave, summarize
from treecast.bench.demonstrate import acceptance_by_depth
from treecast.bench.prompts import DEFAULT_PROMPTS, BenchPrompt, prompts_for, read_prompts
from treecast.bench.report import Report, report_file
from treecast.bench.run import Answer, Prompts, Run
from treecast.cli.app import app
from treecast.cli.bench_comparison import render
from treecast.client import Usage
from treecast.errors import CorpusError, InvalidRequest
from treecast.sampling.params import SpeculationParams
from treecast.services.local import MeshSettings


class Echo:
    """Answers with the prompts' own ids, and notes when it was asked."""

    def __init__(self, name: str, asked: list[tuple[str, str]], batches: bool = True) -> None:
        self.name = name
        self.batches = batches
        self._asked = asked

    def answer(self, prompts: Prompts, max_tokens: int) -> Run:
        self._asked.append((self.name, "".join(prompts)))
        answers = tuple(Answer(name, tuple(ids), 1) for name, ids in prompts.items())
        return Run(self.name, answers, 1.0, 1.0)


def run_of(contender: str, prompt: str, tokens: int, steps: int, seconds: float) -> Run:
    return Run(contender, (Answer(prompt, tuple(range(tokens)), steps),), seconds, first_s=1.0)


def test_a_run_knows_its_rates():
    run = run_of("a", "p", tokens=12, steps=5, seconds=3.0)
    assert (run.tokens_per_s, run.tokens_per_step, run.step_ms) == (4.0, 2.4, 500.0)
    assert run_of("a", "p", tokens=1, steps=1, seconds=1.0).step_ms is None


def test_a_run_of_several_prompts_counts_all_tokens_and_the_longest_steps():
    answers = (Answer("p", tuple(range(12)), 5), Answer("q", tuple(range(3)), 1))
    run = Run("a", answers, seconds=3.0, first_s=1.0)
    assert (run.tokens_per_s, run.tokens_per_step, run.step_ms) == (5.0, 2.5, 500.0)


def test_the_last_group_is_filled_up_from_the_beginning():
    prompts = {name: [place] for place, name in enumerate("abcde")}
    assert ["".join(group) for group in in_groups(prompts, 1)] == [*"abcde"]
    assert ["".join(group) for group in in_groups(prompts, 3)] == ["abc", "dea"]
    assert ["".join(group) for group in in_groups(prompts, 5)] == ["abcde"]


def test_more_prompts_at_once_than_there_are_are_refused():
    done = CliRunner().invoke(app, ["bench", "--at-once", "1,9"])
    assert done.exit_code == 2
    assert "9 prompts at once need as many different ones; there are 8" in done.stderr
    done = CliRunner().invoke(app, ["bench", "--at-once", "1,0"])
    assert "--at-once is '1,0'; numbers from 1 to 256" in done.stderr


def test_those_that_take_one_prompt_are_left_out_of_groups():
    asked: list[tuple[str, str]] = []
    field = [Echo("a", asked), Echo("b", asked, batches=False)]
    prompts = {"p": [1], "q": [2]}
    runs = interleave(field, in_groups(prompts, 1), max_tokens=4, rounds=1)
    runs += interleave(field, in_groups(prompts, 2), max_tokens=4, rounds=1)
    assert asked[-2:] == [("a", "pq"), ("a", "pq")]
    summaries = summarize(runs, ["a", "b"])
    assert [(one.at_once, one.contender) for one in summaries] == [(1, "a"), (1, "b"), (2, "a")]
    assert (summaries[2].num_prompts, summaries[2].same_tokens_as) == (2, {})


def test_the_spread_is_median_and_quartiles():
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([1.0, 2.0]) == Spread(1.5, 1.25, 1.75)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_contenders_take_turns_when_they_are_interleaved():
    asked: list[tuple[str, str]] = []
    field = [Echo("a", asked), Echo("b", asked)]
    runs = interleave(field, in_groups({"p": [1], "q": [2]}, 1), max_tokens=4, rounds=2)
    warm_up, timed = asked[:2], asked[2:]
    assert warm_up == [("a", "p"), ("b", "p")]
    assert timed == [
        *(("a", "p"), ("b", "p"), ("b", "q"), ("a", "q")),
        *(("b", "p"), ("a", "p"), ("a", "q"), ("b", "q")),
    ]
    assert [(run.contender, run.answers[0].prompt_id) for run in runs] == timed


def test_summaries_compare_each_with_the_others():
    runs = [
        run_of("a", "p", tokens=10, steps=10, seconds=5.0),
        run_of("a", "q", tokens=4, steps=4, seconds=1.0),
        run_of("b", "p", tokens=10, steps=5, seconds=2.0),
        run_of("b", "q", tokens=6, steps=3, seconds=2.0),
    ]
    plain, trees = summarize(runs, ["a", "b"])
    assert (plain.same_tokens_as, trees.same_tokens_as) == ({"b": 1}, {"a": 1})
    assert trees.num_prompts == 2
    assert trees.times_as_fast_as == {"a": Spread(1.625, 1.1875, 2.0625)}  # 5 / 2 and 3 / 4
    assert plain.overall_tokens_per_s == pytest.approx(14 / 6)
    assert trees.overall_tokens_per_s == pytest.approx(16 / 4)
    assert trees.tokens_per_step == Spread(2.0, 2.0, 2.0)
    assert trees.tokens_per_s == Spread(4.0, 3.5, 4.5)
    assert trees.step_ms == Spread(375.0, 312.5, 437.5)


def test_the_report_can_be_read_back_when_it_was_saved(tmp_path):
    names = ["transformers", "treecast"]
    runs = [run_of(name, "p", tokens=10, steps=10, seconds=5.0) for name in names]
    mesh = MeshSettings(model="/models/llm", draft="/models/draft")
    report = Report.of(mesh, SpeculationParams(), 10, 1, names, runs, {"torch": "2"})
    saved = report_file(tmp_path / "results")
    assert saved.parent == tmp_path / "results"
    assert not saved.exists()
    report.save(saved)
    read = json.loads(saved.read_text())
    assert read["settings"]["model"] == "llm"
    assert read["versions"]["torch"] == "2"
    assert read["runs"][0]["answers"][0]["token_ids"] == list(range(10))
    assert read["machine"]["cores"] >= 1
    assert render(report).row_count == 2


def test_a_place_for_the_report_is_made_or_refused_before_anything_is_measured(tmp_path):
    assert report_file(tmp_path / "new" / "folder" / "a.json").parent.is_dir()
    (tmp_path / "v1.2").mkdir()
    assert report_file(tmp_path / "v1.2").parent == tmp_path / "v1.2"
    held = tmp_path / "held.json"
    held.write_text("{}")
    assert report_file(held) == held
    assert held.read_text() == "{}"
    with pytest.raises(InvalidRequest, match=r"^--out .*held.json/x.json cannot be written: "):
        report_file(held / "x.json")
    done = CliRunner().invoke(app, ["bench", "--arrivals", "poisson:1", "--out", str(held)])
    assert done.exit_code == 2
    assert f"--out {held / 'arrivals.json'} cannot be written" in done.stderr


def test_acceptance_by_depth_counts_only_trees_that_reached_it():
    usages = [
        Usage(offered_by_depth=(4, 2), accepted_by_depth=(3, 1)),
        Usage(offered_by_depth=(6,), accepted_by_depth=(2,)),
    ]
    assert acceptance_by_depth(usages) == [0.5, 0.5]
    assert acceptance_by_depth([Usage()]) == []


def test_the_prompts_that_ship_are_whole():
    prompts = read_prompts(DEFAULT_PROMPTS)
    assert len(prompts) == len({prompt.id for prompt in prompts}) >= 5
    assert len({prompt.category for prompt in prompts}) >= 5


def test_a_limit_takes_prompts_from_all_over_the_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"id": n, "category": "c", "turns": [f"t{n}", "x"]}) for n in range(10)]
    file.write_text("\n".join([*lines, ""]))
    assert [prompt.id for prompt in read_prompts(file, 4)] == ["0", "2", "5", "7"]
    assert [prompt.text for prompt in read_prompts(file, 99)] == [f"t{n}" for n in range(10)]


def test_a_prompt_file_is_refused_when_an_id_repeats(tmp_path):
    line = json.dumps({"id": "a", "category": "c", "turns": ["t"]})
    (tmp_path / "p.jsonl").write_text(f"{line}\n\n{line}\n")
    with pytest.raises(CorpusError, match=r"line 3 has id 'a', as line 1 has$"):
        read_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize("template", ["{{ messages }}", ""])
def test_prompts_are_chats_when_the_model_has_a_template(tmp_path, template):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    asked = prompts_for(tmp_path, [BenchPrompt("a", "c", "Hi")])
    assert asked == ([[{"role": "user", "content": "Hi"}]] if template else ["Hi"])


@pytest.mark.parametrize("line", ["{}", "[1]", "not json", '{"id": 1, "category": 2, "turns": []}'])
def test_a_prompt_file_is_refused_when_a_line_is_no_prompt(tmp_path, line):
    (tmp_path / "p.jsonl").write_text(f'{{"id": 1, "category": "c", "turns": ["t"]}}\n{line}\n')
    with pytest.raises(CorpusError, match=r"line 2 is no object with id, category and turns"):
        read_prompts(tmp_path / "p.jsonl")


def test_a_prompt_file_is_refused_when_it_is_empty(tmp_path):
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(CorpusError, match="holds no prompt"):
        read_prompts(tmp_path / "p.jsonl")


def test_a_profile_takes_a_gguf_file_as_the_services_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TREECAST_HOME", str(tmp_path / "home"))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    done = CliRunner().invoke(app, ["bench", "--profile", "--model", str(tmp_path / "cut.gguf")])
    assert done.exit_code != 0
    assert "cut.gguf cannot be read here" in str(done.exception) + done.output


def demo(router: ScriptedRouter, *arguments: str) -> tuple[int, str]:
    prompts = ("--limit", "2", "--router", router.address)
    result = CliRunner().invoke(app, ["demo", *prompts, *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


def test_the_demo_shows_both_ways_when_texts_agree():
    with ScriptedRouter(play(started(), delta("Hello", 1, 2, 3), finished(3))) as router:
        code, shown = demo(router, "--max-tokens", "3")
    assert code == 0
    assert "3 tokens in 2 steps" in shown
    assert "identical: yes" in shown
    rows = [line.split() for line in shown.splitlines() if "all" in line.split()]
    assert rows[0][1:8:2] == ["all", "6", "4", "4"]
    warm_up, asked = router.requests[:2], router.requests[2:]
    assert {request.sampling.max_tokens for request in warm_up} == {16}
    assert [request.HasField("max_nodes") for request in asked] == [False, True, False, True]
    assert {request.sampling.temperature for request in asked} == {0}


def test_the_demo_fails_when_texts_differ():
    same = play(started(), delta("a", 1), finished(1))
    other = play(started(), delta("b", 2), finished(1))
    with ScriptedRouter(same, same, same, other, same) as router:
        code, shown = demo(router, "--json")
    document = json.loads(shown)
    assert code == 1
    assert [row["identical"] for row in document["prompts"]] == [False, True]
    assert not document["all"]["identical"]
    assert document["all"]["speculative"]["tokens"] == 2
