"""One model divided among processes: the same tokens, and a group that falls and rises as one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from treecast import Client, SamplingParams
from treecast.client import Stream
from treecast.decoding.local import generate
from treecast.engine.hf import HFEngine
from treecast.sampling.noise import noise_key
from treecast.services.local import LocalMesh, MeshError, MeshSettings, ServiceProcess
from treecast.wire.link import HEARTBEAT_S

from ..byte_tokenizer import byte_tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=20, max_tokens=24, ignore_eos=True)
PROMPTS = ([5, 6, 7, 5, 6, 7, 5, 6], list(range(10, 90)), [3])
BACK_S = 120.0

_COMMON: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 8, "max_position_embeddings": 1024, "bos_token_id": 256,
    "eos_token_id": 257, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(num_key_value_heads=4, **_COMMON),
    "qwen3": lambda: transformers.Qwen3Config(num_key_value_heads=4, head_dim=16, **_COMMON),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_COMMON),
}

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models with random weights; the vocabulary does not come out even for any group."""
    made = {}
    for name, config in FAMILIES.items():
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config())
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        made[name] = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(made[name])
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["<unused>"])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(made[name])
    return made


def in_one_process(folder: Path, sampling: SamplingParams) -> list[list[int]]:
    """The oracle: plain decoding by the whole model."""
    engine = HFEngine.load(folder, dtype="float32", threads=1)
    key = noise_key(sampling.seed or 0, 0)
    return [generate(engine, prompt, sampling, key).tokens for prompt in PROMPTS]


def settings(
    folder: Path, speculators: tuple[str, ...], log_dir: Path, **verifier: object
) -> MeshSettings:
    """The draft model of `ssm` is the target itself."""
    return MeshSettings(
        model=str(folder),
        draft=str(folder),
        dtype="float32",
        speculators=speculators,
        planner="full",
        torch_threads=1,
        log_dir=log_dir,
        verifier_flags={"rank_timeout_s": 60, "pool_tokens": 2048, **verifier},
        speculator_flags={"pool_tokens": 2048},
    )


def answers(client: Client, sampling: SamplingParams) -> tuple[list[list[int]], int]:
    """Tokens of every prompt, asked side by side, and how many came by way of trees."""
    streams = [client.generate(prompt, sampling) for prompt in PROMPTS]
    results = [stream.result() for stream in streams]
    accepted = sum(result.usage.accepted for result in results)
    return [list(result.token_ids) for result in results], accepted


def check_same_tokens(
    folder: Path, speculators: tuple[str, ...], log_dir: Path, **shape: int
) -> None:
    with (
        LocalMesh(settings(folder, speculators, log_dir, **shape)) as mesh,
        Client(mesh.router_address) as client,
    ):
        by_trees = 0
        for sampling in (GREEDY, SAMPLED):
            tokens, accepted = answers(client, sampling)
            assert tokens == in_one_process(folder, sampling)
            by_trees += accepted  # lookup may find nothing in a text that was sampled
        assert by_trees > 0


def check_exact(log_dir: Path) -> None:
    """The verifier's own check at start found no row whose bits depend on what is beside it."""
    log = (log_dir / "verifier-0.log").read_text()
    assert "model.loaded" in log
    assert "numerics.not_exact" not in log


def test_tokens_are_those_of_one_process_when_two_ranks_divide_each_layer(folders, tmp_path):
    check_same_tokens(folders["llama"], ("ngram",), tmp_path, tp=2)
    check_exact(tmp_path)


def swapped_in_bytes(mesh: LocalMesh) -> float:
    """By the verifier's own count."""
    with urlopen(f"http://{mesh.processes['verifier-0'].metrics_address}/metrics") as answer:
        text = answer.read().decode()
    found = re.search(r'treecast_verifier_swap_bytes_total\{direction="in"\} (\S+)', text)
    assert found is not None
    return float(found[1])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"tp": 2}, {"pp": 2}], ids=["tp", "pp"])
def test_tokens_are_those_of_one_process_when_ranks_swap_out_what_they_share(
    folders, tmp_path, shape
):
    """Two texts of 8 pages each in 8: one is paused, and its KV leaves every rank's pool."""
    sampling = replace(SAMPLED, max_tokens=500)
    whole = HFEngine.load(folders["llama"], dtype="float32", threads=1)
    prompts = PROMPTS[0], PROMPTS[0][:-1]
    expected = [generate(whole, prompt, sampling, noise_key(20, 0)).tokens for prompt in prompts]
    with (
        LocalMesh(settings(folders["llama"], (), tmp_path, pool_tokens=512, **shape)) as mesh,
        Client(mesh.router_address) as client,
    ):
        streams = [client.generate(prompt, sampling) for prompt in prompts]
        for stream in streams:
            next(stream)  # a stream begins when it is read
        results = [stream.result() for stream in streams]
        assert [list(result.token_ids) for result in results] == expected
        position_bytes = whole.usage.position_bytes
        assert swapped_in_bytes(mesh) >= 64 * position_bytes


@pytest.mark.slow
def test_bits_stay_a_rows_own_when_four_ranks_are_summed(folders, tmp_path):
    with LocalMesh(settings(folders["llama"], (), tmp_path, tp=4)):
        check_exact(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_tokens_are_those_of_one_process_for_any_group(folders, tmp_path, family, tp):
    check_same_tokens(folders[family], ("ssm", "ngram"), tmp_path, tp=tp)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tp", [1, 2])
def test_tokens_are_those_of_one_process_when_the_layers_are_divided(folders, tmp_path, family, tp):
    check_same_tokens(folders[family], ("ssm", "ngram"), tmp_path, tp=tp, pp=2)


@pytest.mark.slow
def test_a_group_is_refused_by_name_when_it_does_not_divide_the_kv_heads(folders, tmp_path):
    mesh = LocalMesh(settings(folders["llama"], (), tmp_path, tp=3))
    with pytest.raises(MeshError, match=r"--tp 3 does not divide the 4 KV heads of llama"):
        mesh.start()


def serving_verifier(mesh: LocalMesh, client: Client, stream: Stream) -> ServiceProcess:
    """The process behind a stream, once the verifiers' heartbeats agree on it."""
    began = time.monotonic()
    for _ in stream:
        if time.monotonic() - began > 2 * HEARTBEAT_S:
            break
    (serving,) = [v.address for v in client.status().verifiers if v.running]
    processes = [mesh.processes[f"verifier-{number}"] for number in range(2)]
    return next(process for process in processes if process.address == serving)


def ranks(process: ServiceProcess) -> list[psutil.Process]:
    """A group's processes, rank 0 first."""
    children = psutil.Process(process.pid).children()
    return sorted(children, key=lambda child: int(child.environ()["RANK"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "number"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)]
)
def test_the_text_is_the_same_and_the_group_comes_back_when_a_rank_is_lost(
    folders, tmp_path, record_property, rank, number
):
    long = replace(SAMPLED, max_tokens=600)
    with (
        LocalMesh(
            replace(
                settings(folders["llama"], (), tmp_path, tp=2, rank_timeout_s=10), num_verifiers=2
            )
        ) as mesh,
        Client(mesh.router_address) as client,
    ):
        expected = client.generate(PROMPTS[0], long).result().token_ids
        stream = client.generate(PROMPTS[0], long)
        group = serving_verifier(mesh, client, stream)
        before = ranks(group)
        began = time.monotonic()
        before[rank].send_signal(number)
        result = stream.result()
        assert result.token_ids == expected
        assert result.samples[0].placements == 2
        assert result.samples[0].same_numerics
        record_property("stream_ended_s", time.monotonic() - began)
        mesh.wait_whole(BACK_S)
        record_property("group_back_s", time.monotonic() - began)
        assert not any(old.is_running() for old in before)
        assert len(ranks(group)) == 2
        assert client.generate(PROMPTS[0], long).result().token_ids == expected
    assert "group.lost" in group.log_path.read_text()


@contextmanager
def by_environment(folder: Path, log_dir: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two ranks as torchrun or a set of pods starts them, each told its place alone."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    flags = ["--model", str(folder), "--dtype=float32", "--tp=2", "--announce", "--torch-threads=1"]
    started = []
    for rank in range(2):
        with (log_dir / f"rank-{rank}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "treecast.services.verifier", *flags],
                    env=os.environ | world | {"RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
                    stdout=subprocess.PIPE,
                    stderr=log,
                )
            )
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_rank_0_ends_and_says_why_when_another_rank_is_lost_while_nothing_runs(folders, tmp_path):
    with by_environment(folders["llama"], tmp_path) as (first, second):
        assert json.loads(first.stdout.readline())["role"] == "verifier"
        second.kill()
        assert first.wait(60) == 2
    assert "the group of 2 ranks has broken at rank 0" in (tmp_path / "rank-0.log").read_text()


@pytest.mark.slow
def test_every_rank_ends_well_when_rank_0_is_told_to_stop(folders, tmp_path):
    with by_environment(folders["llama"], tmp_path) as (first, second):
        assert json.loads(first.stdout.readline())["role"] == "verifier"
        second.terminate()  # as torchrun does to all; rank 0 says when
        first.terminate()
        assert (first.wait(60), second.wait(60)) == (0, 0)
