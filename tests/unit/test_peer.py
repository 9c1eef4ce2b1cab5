"""Peers in Pythons of their own: the process, its answers, and what is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from treecast.bench import peer as peers
from treecast.bench.peer import PEERS, PeerChoice, PeerContender, PeerProcess
from treecast.bench.run import Answer
from treecast.errors import InvalidRequest, TreecastError
from treecast.services.local import MeshSettings

SCRIPTS = Path(peers.__file__).resolve().parent / "peers"
FLAGS = ["--model", "none", "--dtype", "float32", "--threads", "1"]
COUNTING = """
import sys
sys.path.insert(0, {scripts!r})
from serving import serve

def load(flags):
    def answer(prompts, max_tokens, first):
        assert len(prompts) <= flags.at_once
        said = [[] for _ in prompts]
        for place in range(max_tokens):
            first()
            for ids, prompt_ids in zip(said, prompts):
                ids.append(prompt_ids[-1] + 1 + place)
        return said
    return "1.0 " + flags.dtype, answer

serve("json", load)
"""


def test_a_peer_answers_from_a_process_of_its_own(tmp_path: Path) -> None:
    script = tmp_path / "counting.py"
    script.write_text(COUNTING.format(scripts=str(SCRIPTS)))
    command = [sys.executable, str(script), *FLAGS, "--at-once", "2"]
    with PeerProcess("counting", command, 1) as process:
        assert process.versions == {"json": "1.0 float32"}
        run = PeerContender("counting", process).answer({"p": [3, 4], "q": [9]}, 3)
    assert run.answers == (Answer("p", (5, 6, 7), 3), Answer("q", (10, 11, 12), 3))
    assert 0 < run.first_s <= run.seconds


@pytest.mark.parametrize("name", PEERS)
def test_a_package_that_is_missing_is_named(name: str) -> None:
    command = [sys.executable, "-S", str(SCRIPTS / PEERS[name].script), *FLAGS]
    with (
        pytest.raises(TreecastError, match=rf"peer {name} needs the package {name}.* lacks"),
        PeerProcess(name, command, 1),
    ):
        pass


def test_a_python_that_is_not_there_is_named() -> None:
    with (
        pytest.raises(TreecastError, match="peer vllm cannot be run by /no/python: No such file"),
        PeerProcess("vllm", ["/no/python"], 1),
    ):
        pass


def test_a_peer_that_reads_gguf_asks_for_a_file_where_none_is_known() -> None:
    (choice,) = PeerChoice.parse(["openvino=/x"], [])
    with pytest.raises(InvalidRequest, match=r"--peer-model openvino=FILE\.gguf"):
        choice.process(MeshSettings(model="/models/other"))


def test_a_peer_takes_the_type_that_suits_it() -> None:
    (choice,) = PeerChoice.parse(["vllm=/x"], [], ["vllm=bfloat16"])
    assert choice.dtype == "bfloat16"
    with pytest.raises(
        InvalidRequest, match="--peer-dtype is 'vllm=int8'; the type is bfloat16 or"
    ):
        PeerChoice.parse(["vllm=/x"], [], ["vllm=int8"])
    with pytest.raises(InvalidRequest, match="--peer-dtype names vllm, which no --peer names"):
        PeerChoice.parse([], [], ["vllm=float32"])


@pytest.mark.parametrize(
    ("given", "models", "message"),
    [
        (["other=/x"], [], "--peer is 'other=/x'; NAME=PATH, each name once, of vllm"),
        (["vllm"], [], "--peer is 'vllm'"),
        (["vllm=/x", "vllm=/y"], [], "--peer is 'vllm=/y'"),
        ([], ["vllm=/x"], "--peer-model names vllm, which no --peer names"),
    ],
)
def test_peers_that_cannot_be_read_are_refused(
    given: list[str], models: list[str], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        PeerChoice.parse(given, models)
