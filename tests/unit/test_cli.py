"""The command line against a router on a real port that says what the test tells it to."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.scripted_router import ScriptedRouter, delta, fail, finished, hang, play, started
from treecast import __version__
from treecast.cli.app import app
from treecast.cli.chat import _take_turn as take_turn
from treecast.cli.output import stderr, stdout
from treecast.cli.status import render
from treecast.cli.up import check_free
from treecast.client import Status, VerifierStatus
from treecast.errors import (
    CorpusError,
    InvalidRequest,
    Overloaded,
    SettingsError,
    Unauthenticated,
)
from treecast.tree import ROOT, TokenTree
from treecast.wire import codec
from treecast.wire.rounds import Round, RoundDraft

HELLO = play(started(), delta("Hel", 10), delta("lo", 11, 12), finished(3))
TREECAST = [sys.executable, "-m", "treecast.cli"]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TREECAST_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def router() -> Iterator[ScriptedRouter]:
    with ScriptedRouter(HELLO) as router:
        yield router


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)


def lines(result: Result) -> list[dict]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_generate_prints_the_text_alone_when_piped(router):
    result = run("generate", "Say hello", "--router", router.address)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hello\n", "")


def test_generate_asks_as_the_options_say_when_given(router):
    run(
        *("generate", "Say hello", "--system", "Be brief", "-n", "5", "-t", "0.5", "--top-k", "3"),
        *("--top-p", "0.9", "--min-p", "0.1", "--repetition-penalty", "1.1", "--seed", "9"),
        *("--presence-penalty", "0.2", "--frequency-penalty", "0.3", "--stop", "a", "--stop", "b"),
        *("--ignore-eos", "--logprobs", "2", "--max-nodes", "0", "--session", "s", "--priority"),
        *("3", "--law", "mss", "--proposal", "iid", "--growth", "<2,1>", "--adapter", "pirate"),
        *("--router", router.address),
    )
    (sent,) = router.requests
    turns = [(message.role, message.content) for message in sent.chat.messages]
    assert turns == [("system", "Be brief"), ("user", "Say hello")]
    sampling = sent.sampling
    assert (sampling.max_tokens, sampling.top_k, sampling.seed) == (5, 3, 9)
    assert sampling.temperature == pytest.approx(0.5)
    assert (sampling.top_p, sampling.min_p) == pytest.approx((0.9, 0.1))
    assert sampling.repetition_penalty == pytest.approx(1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == pytest.approx((0.2, 0.3))
    assert list(sampling.stop) == ["a", "b"]
    assert sampling.ignore_eos
    assert sampling.logprobs == 2
    assert (sent.law, sent.proposal, sent.growth) == (2, 3, "<2,1>")
    assert (sent.max_nodes, sent.session_id, sent.priority) == (0, "s", 3)
    assert sent.adapter == "pirate"


def test_generate_refuses_a_proposal_when_the_law_cannot_serve_it(router):
    result = run("generate", "x", "--law", "mss", "--proposal", "topk", "--router", router.address)
    assert result.exit_code != 0
    assert "proposal under law mss is topk" in result.stderr
    assert "allowed: without_replacement, iid" in result.stderr
    assert router.requests == []


def test_generate_streams_json_lines_when_asked(router):
    result = run("generate", "Say hello", "--json", "--router", router.address)
    first, second, last = lines(result)
    assert first == {
        "event": "chunk",
        "sample_index": 0,
        "text": "Hel",
        "token_ids": [10],
        "logprobs": [],
    }
    assert (second["text"], second["token_ids"]) == ("lo", [11, 12])
    assert (last["event"], last["seed"], last["prompt_ids"]) == ("result", 7, [5, 6])
    (sample,) = last["samples"]
    assert (sample["text"], sample["finish_reason"]) == ("Hello", "length")
    assert (sample["usage"]["steps"], sample["usage"]["accepted_by_depth"]) == (2, [1, 0])


def test_generate_reads_the_prompt_when_it_comes_by_pipe_file_or_ids(router, tmp_path):
    (tmp_path / "prompt.txt").write_text("from a file")
    address = ("--router", router.address)
    run("generate", "-", "--raw", *address, stdin="from a pipe")
    run("generate", "--raw", "--file", str(tmp_path / "prompt.txt"), *address)
    run("generate", "--token-ids", "5,6", *address)
    piped, filed, ids = router.requests
    assert (piped.text, filed.text, list(ids.tokens.ids)) == ("from a pipe", "from a file", [5, 6])


@pytest.mark.parametrize("option", ["--json-schema", "--grammar"])
def test_generate_refuses_a_rule_when_its_file_is_empty_or_no_text(router, tmp_path, option):
    file = tmp_path / "rule"
    for held, complaint in ((b" \n", "is empty"), (b"\xff\xfe", "cannot be read: 'utf-8' codec")):
        file.write_bytes(held)
        result = run("generate", "x", option, str(file), "--router", router.address)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"treecast: {option} {file} {complaint}")
    assert not router.requests


def test_trace_writes_a_page_when_the_answer_has_ended(tmp_path):
    tree = TokenTree.build([10, 11], [ROOT, ROOT], [0.5, 0.5], [1, 1])
    told = Round(0, tree, (0,), 12, (RoundDraft("s1", ("ssm",), 2, 5, 5),), 0, 10, 20)
    reply = delta("Hello", 10, 12)
    reply.delta.rounds.add(
        round=codec.encode_round(told), text="Hello", node_texts=["Hel", "Hol"], bonus_text="lo"
    )
    out = tmp_path / "page.html"
    with ScriptedRouter(play(started(), reply, finished(2))) as router:
        result = run("trace", "Say <b>hello", "-o", str(out), "--router", router.address)
    assert (result.exit_code, result.stdout) == (0, "Hello\n")
    assert f"rounds drawn in {out}: 1" in result.stderr
    assert router.requests[0].report_rounds
    page = out.read_text()
    assert "Say &lt;b&gt;hello" in page
    assert "Hol: rejected; proposed by ssm at 47%" in page  # a byte of confidence


def test_trace_asks_nobody_when_the_page_cannot_be_written(router, tmp_path):
    out = tmp_path / "missing" / "page.html"
    result = run("trace", "x", "-o", str(out), "--router", router.address)
    assert result.exit_code == 2
    assert f"--out {out} cannot be written" in result.stderr
    assert router.requests == []


def test_generate_prints_each_sample_when_several_are_asked_for():
    script = play(
        started(),
        started(sample_index=1),
        delta("b", 2, sample_index=1),
        delta("a", 1),
        finished(1),
        finished(1, sample_index=1),
    )
    with ScriptedRouter(script) as router:
        result = run("generate", "x", "--num-samples", "2", "--router", router.address)
    assert result.stdout == "--- sample 0\na\n--- sample 1\nb\n"


def test_generate_says_what_it_cost_when_stats_are_asked_for(router):
    result = run("generate", "x", "--stats", "--router", router.address)
    assert result.stdout == "Hello\n"
    assert "3 tokens in 2 steps (1.50 per step)" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("top_p is 2; allowed: (0, 1]"), 2),
        (Unauthenticated("API key is unknown"), 2),
        (CorpusError("corpus c holds no complete record"), 2),
        (Overloaded("the queue is full"), 3),
    ],
)
def test_the_exit_code_tells_the_kind_when_a_request_is_refused(error, code):
    with ScriptedRouter(fail(error)) as router:
        result = run("generate", "x", "--router", router.address)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr == f"treecast: {error.message}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "0 prompts are given; give one: PROMPT, '-' for stdin, --file or"),
        (["generate", "x", "--token-ids", "1"], "2 prompts are given"),
        (["generate", "--token-ids", "1,b"], "--token-ids is '1,b'; it must be like 1,2,3"),
        (["generate", "--file", "/no/such/file"], "--file /no/such/file cannot be read"),
        (["generate", "x", "--raw", "--system", "s"], "--raw and --system do not go together"),
        (["trace", "--token-ids", "1", "--system", ""], "--token-ids and --system do not go"),
        (["generate", "--token-ids", "1", "--raw"], "--token-ids and --raw do not go together"),
        (["generate", "x", "-t", "-1"], "temperature is -1.0; allowed: 0..100"),
        (["generate", "x", "--router", "nowhere"], "it must be host:port"),
        (["status", "--router", "nowhere"], "it must be host:port"),
        (["models", "check", "/no/such/folder"], "model folder /no/such/folder does not exist"),
        (["tune", "out", "--model", "/no", "--layers", "a"], "--layers is 'a'; it must be like"),
        (["bench", "--contenders", "other"], "--contenders is 'other'; known: transformers"),
        (
            ["bench", "--contenders", "treecast,treecast"],
            "--contenders is 'treecast,treecast'; known: transformers, transformers-assisted, "
            "treecast-plain, treecast, each at most once",
        ),
        (["bench", "--model", "m"], "--model and --draft go together: a draft fits one model"),
        (["bench", "--speculators", "ngram"], "the comparison needs ssm in it"),
        (
            ["bench", "--peer", "other=/x"],
            "--peer is 'other=/x'; NAME=PATH, each name once, of vllm",
        ),
        (["bench", "--peer-model", "vllm=/x"], "--peer-model names vllm, which no --peer names"),
        (["bench", "--arrivals", "even:3"], "--arrivals is 'even:3'; poisson:RATE, RATE above 0"),
        (["bench", "--arrivals", "poisson:0"], "--arrivals is 'poisson:0'; poisson:RATE"),
        (["bench", "--arrivals", "poisson:1", "--levels", "0"], "--levels is '0'; numbers from 1"),
        (["bench", "--arrivals", "poisson:1", "--levels", "²"], "--levels is '²'; numbers from 1"),
        (
            ["bench", "--arrivals", "poisson:1e9"],
            "1e+09 requests a second for 60 s are 6e+10; the limit is 100000",
        ),
        (["bench", "--levels", "1"], "a comparison does not heed --levels"),
        (["bench", "--arrivals", "poisson:1", "--rounds", "2"], "does not heed --rounds"),
        (["bench", "--arrivals", "poisson:1", "--peer-model", "a=b"], "does not heed --peer-model"),
        (["bench", "--arrivals", "poisson:1", "--sections", "laws"], "does not heed --sections"),
        (
            ["bench", "--arrivals", "poisson:1", "--contenders", "treecast,treecast-plain"],
            "--contenders is 'treecast,treecast-plain'; --arrivals knows treecast or",
        ),
        (["bench", "--arrivals", "poisson:1", "--profile"], "--profile and --arrivals measure"),
        (["bench", "--profile", "--rounds", "2"], "--profile does not heed --rounds"),
        (["bench", "--profile", "--peer-model", "a=b"], "--profile does not heed --peer-model"),
        (["up", "--listen", "7070"], "--listen is '7070'; it must be host:port"),
        (["demo", "--prompts", "/no/such/file"], "prompts /no/such/file cannot be read"),
    ],
)
def test_a_command_ends_with_a_line_when_it_cannot_work(arguments, message):
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert result.stderr.startswith("treecast: ")
    assert message in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--arrivals", "poisson:1", "--seconds", "inf"],
        ["bench", "--arrivals", "poisson:1", "--seed", "-1"],
        ["status", "--watch", "nan"],
        ["status", "--watch", "1e10"],
        ["tune", "out", "--minutes", "nan"],
    ],
)
def test_an_option_is_refused_when_its_number_is_nonsense(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert f"Invalid value for '{arguments[-2]}'" in result.stderr.replace(" / -w", "")


def test_usage_errors_exit_with_2_when_an_option_is_unknown():
    assert run("generate", "x", "--unknown").exit_code == 2


def test_up_names_address_and_flag_when_the_address_is_in_use(router):
    result = run("up", "--listen", router.address)
    assert result.exit_code == 2
    assert result.stderr == (
        f"treecast: cannot listen on {router.address}: address already in use; "
        "choose another address with --listen HOST:PORT (port 0 picks one)\n"
    )


def test_up_uses_the_redis_that_the_environment_names(monkeypatch):
    given = []

    def running_mesh(settings):
        given.append(settings.redis_url)
        raise KeyboardInterrupt

    monkeypatch.setattr("treecast.cli.up.running_mesh", running_mesh)
    monkeypatch.setenv("TREECAST_REDIS_URL", "redis://there")
    run("up", "--listen", "127.0.0.1:0")
    assert given == ["redis://there"]


def test_up_finds_an_address_free_when_it_is_an_ipv6_one():
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    check_free("[::1]:0", "--listen")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        address = f"[::1]:{taken.getsockname()[1]}"
        with pytest.raises(SettingsError, match=f"^cannot listen on {re.escape(address)}: address"):
            check_free(address, "--listen")


def test_status_exits_with_3_when_no_router_is_there():
    with ScriptedRouter(HELLO) as gone:
        pass
    result = run("status", "--router", gone.address)
    assert result.exit_code == 3
    assert result.stderr.startswith(f"treecast: router {gone.address}: ")


def test_status_shows_the_workers_when_the_router_answers(router):
    table = run("status", "--router", router.address).stdout
    assert "running 1, queued 3, redis ok" in table
    assert "10.0.0.1:7000" in table
    document = lines(run("status", "--json", "--router", router.address))[0]
    assert document["verifiers"][0]["kv_pages_free"] == 30
    assert (document["queued"], document["redis_ok"]) == (3, True)


def test_names_and_addresses_are_shown_as_they_are_when_they_look_like_markup(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    address, model = "[fd00:a:7]:7071", "mine[/b] :a: [red]"
    verifier = VerifierStatus(address, True, "i", model, "", 1, 0, 3, 4, (address,), "")
    for console in (stdout(), stderr()):
        console.print(render(Status((verifier,), 1, 0, redis_ok=True)))
    for said in capsys.readouterr():
        assert said.count(address) == 2
        assert model in said
        assert "healthy" in said


def test_models_lists_what_is_served_when_the_router_answers(router):
    (served,) = lines(run("models", "list", "--json", "--router", router.address))
    assert served[0]["name"] == "toy"
    assert "toy" in run("models", "list", "--router", router.address).stdout


def test_chat_sends_the_turns_before_when_it_goes_on(router):
    result = run("chat", "--router", router.address, stdin="Hi\nAgain\n")
    assert result.stdout == "Hello\nHello\n"
    first, second = router.requests
    assert [message.content for message in first.chat.messages] == ["Hi"]
    turns = [(message.role, message.content) for message in second.chat.messages]
    assert turns == [("user", "Hi"), ("assistant", "Hello"), ("user", "Again")]
    assert first.session_id == second.session_id != ""


def test_chat_forgets_the_turns_when_told_to(router):
    run("chat", "--system", "S", "--router", router.address, stdin="Hi\n/new\nAgain\n/exit\nNo\n")
    second = router.requests[1]
    assert len(router.requests) == 2
    assert [message.content for message in second.chat.messages] == ["S", "Again"]


def test_chat_frees_its_session_unless_it_was_named(router):
    run("chat", "--router", router.address, stdin="Hi\n")
    run("chat", "--session", "mine", "--router", router.address, stdin="Hi\n")
    first, second = router.requests
    assert second.session_id == "mine"
    assert router.closed == [first.session_id]


def test_chat_prints_nothing_but_json_when_an_answer_is_stopped(capsys):
    class Stopped:
        def ask(self, text, show):
            raise KeyboardInterrupt

    take_turn(Stopped(), "Hi", as_json=True, at_terminal=True)
    out, err = capsys.readouterr()
    assert (out, "stopped" in err) == ("", True)


def test_chat_prints_json_when_asked(router):
    (turn,) = lines(run("chat", "--json", "--router", router.address, stdin="Hi\n"))
    assert (turn["text"], turn["finish_reason"], turn["usage"]["steps"]) == ("Hello", "length", 2)


def test_the_version_is_printed_when_asked():
    assert run("--version").stdout == f"treecast {__version__}\n"


@pytest.mark.parametrize(
    "command", ["up", "generate", "chat", "status", "bench", "tune", "models", "demo"]
)
def test_help_teaches_by_example_when_asked(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "For example:" in result.stdout
    assert f"treecast {command}" in result.stdout
    assert "--json" in result.stdout


def test_ctrl_c_ends_generate_quietly_when_it_is_streaming():
    with ScriptedRouter(hang(started(), delta("Hel", 10))) as router:
        process = subprocess.Popen(
            [*TREECAST, "generate", "x", "--router", router.address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with process:
            assert process.stdout is not None
            assert process.stdout.read(3) == b"Hel"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        assert router.ended.wait(5)
    assert process.returncode == 130
    assert errors == b"treecast: interrupted\n"


def test_the_exit_code_reaches_the_shell_when_no_router_is_there():
    with ScriptedRouter(HELLO) as gone:
        pass
    done = subprocess.run(
        [*TREECAST, "generate", "x", "--router", gone.address], capture_output=True, check=False
    )
    assert done.returncode == 3
    assert done.stdout == b""
    assert b"Traceback" not in done.stderr


def test_torch_is_not_imported_when_a_command_does_not_need_it():
    code = (
        "import sys, treecast.cli.app; from treecast import Client, AsyncClient, SamplingParams; "
        "import treecast.bench.demonstrate, treecast.services.local; "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"[]\n"


def test_tune_has_the_corpus_written_as_asked_when_openings_are_given(tmp_path, monkeypatch):
    from treecast.cli import tune
    from treecast.tuning.selfplay import generate_corpus

    played = []
    monkeypatch.setattr("treecast.tuning.boost.check", lambda settings: None)
    monkeypatch.setattr(
        f"{generate_corpus.__module__}.generate_corpus", lambda s, _: played.append(s)
    )
    monkeypatch.setattr(tune, "train", lambda *_: sys.exit(7))
    kinds = tmp_path / "kinds.txt"
    kinds.write_text("Sum up: \n\n  Translate: Der\n")
    told = ("--model", "m", "--records", "9", "--openings", str(kinds), "--user-tokens", "200")
    assert run("tune", str(tmp_path), *told, "--answer-tokens", "64", "--json").exit_code == 7
    (settings,) = played
    assert settings.openings == ("Sum up:", "Translate: Der")
    assert (settings.num_records, settings.max_user_tokens, settings.max_answer_tokens) == (
        9,
        200,
        64,
    )


@pytest.mark.parametrize(
    ("held", "complaint"),
    [(None, "cannot be read"), (b" \n\n", "holds no line"), (b"\xff\xfe", "cannot be read")],
)
def test_tune_names_an_openings_file_that_is_of_no_use(tmp_path, held, complaint):
    kinds = tmp_path / "kinds.txt"
    if held is not None:
        kinds.write_bytes(held)
    result = run("tune", str(tmp_path), "--model", "m", "--records", "1", "--openings", str(kinds))
    assert result.exit_code == 2
    assert f"--openings {kinds} {complaint}" in result.stderr.replace("\n", " ")


def test_tune_maps_its_options_when_they_are_given(tmp_path, monkeypatch):
    from treecast.cli import tune
    from treecast.tuning.settings import DraftReport, TuneReport

    asked = []

    def train(settings, threads, progress):
        asked.append((settings, threads))
        draft = DraftReport("d", tmp_path, (0, 2), 8, 9, 5, 1, 1.0, 2.5, 1.0, (0.5, 0.75))
        return TuneReport(tmp_path, (draft,), (0.5, 0.75), (1.0, 2.0), None, (), 10, 1, 99, ())

    monkeypatch.setattr(tune, "train", train)
    result = run(
        *("tune", str(tmp_path), "--model", "m", "--corpus", "c.jsonl", "--minutes", "0.5"),
        *(
            "--layers",
            "0,2",
            "--drafts",
            "2",
            "--head-rows",
            "8",
            "--loss",
            "tokens",
            "--max-steps",
            "5",
            "--batch-size",
            "2",
            "--threads",
            "1",
            "--json",
        ),
    )
    ((settings, threads),) = asked
    assert (settings.target, settings.corpus, settings.out) == (
        Path("m"),
        Path("c.jsonl"),
        tmp_path,
    )
    assert (settings.minutes, settings.layers, settings.max_steps) == (0.5, ((0, 2),), 5)
    assert (settings.drafts, settings.head_rows, settings.teacher_share) == (2, 8, 0.0)
    assert (settings.batch_size, threads) == (2, 1)
    (report,) = lines(result)
    assert report["event"] == "result"
    assert report["drafts"][0]["heldout_success"] == report["union_success"] == [0.5, 0.75]
