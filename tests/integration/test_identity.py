"""The same text, whatever drafts it, whoever is beside it and whoever dies: the real model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import openai
import pytest

from treecast import Client, SamplingParams
from treecast.client import Result, Stream
from treecast.services.local import LocalMesh, MeshSettings, ServiceProcess
from treecast.wire.link import HEARTBEAT_S

from .prompts import SOME, spec_bench

GREEDY = SamplingParams(temperature=0, max_tokens=20)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=20, max_tokens=20)
LATER = pytest.param(SAMPLED, marks=pytest.mark.slow)
NUM_TOKENS = 48

pytestmark = [pytest.mark.model, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def mesh() -> Iterator[LocalMesh]:
    settings = MeshSettings(num_verifiers=2, numerics="exact", http_listen="127.0.0.1:0")
    with LocalMesh(settings) as mesh:
        yield mesh


@pytest.fixture
def client(mesh: LocalMesh) -> Iterator[Client]:
    for name in mesh.processes:
        if not mesh.processes[name].running:
            mesh.restart(name)
    mesh.wait_whole(60)
    with Client(mesh.router_address) as client:
        yield client


def begin(client: Client, prompt: str, sampling: SamplingParams, **options: int) -> Stream:
    return client.generate([{"role": "user", "content": prompt}], sampling, **options)


def ask(client: Client, prompt: str, sampling: SamplingParams, **options: int) -> Result:
    return begin(client, prompt, sampling, **options).result()


def tokens(results: Sequence[Result]) -> list[tuple[int, ...]]:
    return [result.token_ids for result in results]


def plainly(client: Client, prompts: Sequence[str], sampling: SamplingParams) -> list[Result]:
    return [ask(client, prompt, sampling, max_nodes=0) for prompt in prompts]


@pytest.mark.parametrize("sampling", [GREEDY, LATER], ids=["greedy", "sampled"])
def test_text_is_the_same_with_speculators_and_beside_other_streams(
    client: Client, sampling: SamplingParams
) -> None:
    prompts = SOME[:2]
    expected = tokens(plainly(client, prompts, sampling))
    alone = [ask(client, prompt, sampling) for prompt in prompts]
    assert tokens(alone) == expected
    assert sum(result.usage.accepted for result in alone) > 0
    with ThreadPoolExecutor(6) as pool:
        beside = list(pool.map(lambda prompt: ask(client, prompt, sampling), prompts * 3))
    assert tokens(beside) == expected * 3


def test_openais_client_streams_the_same_chat_with_usage_and_logprobs(
    mesh: LocalMesh, client: Client
) -> None:
    expected = ask(client, SOME[0], replace(SAMPLED, logprobs=2))
    base_url = f"http://{mesh.processes['router'].http_address}/v1"
    with openai.OpenAI(base_url=base_url, api_key="none") as foreign:
        [model] = foreign.models.list().data
        chunks = list(
            foreign.chat.completions.create(
                model=model.id,
                messages=[{"role": "user", "content": SOME[0]}],
                temperature=0.8,
                top_p=0.95,
                seed=20,
                max_tokens=20,
                logprobs=True,
                top_logprobs=2,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == expected.text
    entries = [one for c in choices if c.logprobs for one in c.logprobs.content or ()]
    assert [one.logprob for one in entries] == [one.chosen for one in expected.logprobs]
    assert [len(one.top_logprobs) for one in entries] == [2] * len(entries)
    said = b"".join(bytes(one.bytes or ()) for one in entries).decode()
    assert said.startswith(expected.text)
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens == expected.usage.prompt_tokens
    assert usage.completion_tokens == len(expected.token_ids)
    assert {chunk.system_fingerprint for chunk in chunks} == {expected.numerics_fingerprint}


@pytest.mark.parametrize("sampling", [GREEDY, LATER], ids=["greedy", "sampled"])
def test_text_is_the_same_when_speculators_are_killed_mid_stream(
    mesh: LocalMesh, client: Client, sampling: SamplingParams
) -> None:
    longer = replace(sampling, max_tokens=40)
    (expected,) = plainly(client, SOME[1:2], longer)
    stream = begin(client, SOME[1], longer)
    for victim in ("ssm", "ngram"):
        next(stream)
        mesh.processes[victim].kill()
    assert stream.result().token_ids == expected.token_ids


def serving_verifier(mesh: LocalMesh, client: Client, stream: Stream) -> ServiceProcess:
    """The process behind a stream, once the verifiers' heartbeats agree on it."""
    began = time.monotonic()
    for _ in stream:
        if time.monotonic() - began > 2 * HEARTBEAT_S:
            break
    (serving,) = [v.address for v in client.status().verifiers if v.running]
    processes = [mesh.processes[f"verifier-{number}"] for number in range(2)]
    return next(process for process in processes if process.address == serving)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_text_is_the_same_when_its_verifier_is_killed_mid_stream(
    mesh: LocalMesh, client: Client, sampling: SamplingParams
) -> None:
    longer = replace(sampling, max_tokens=72)
    (expected,) = plainly(client, SOME[1:2], longer)
    stream = begin(client, SOME[1], longer)
    serving_verifier(mesh, client, stream).kill()
    result = stream.result()
    assert result.token_ids == expected.token_ids
    assert result.text == expected.text
    assert result.samples[0].placements == 2
    assert result.samples[0].same_numerics


def while_a_verifier_dies(
    mesh: LocalMesh, client: Client, prompts: Sequence[str], sampling: SamplingParams, victim: str
) -> list[Result]:
    """Asked all at once; one of the two verifiers is killed when each has its first tokens."""
    streams = [begin(client, p, sampling) for p in prompts]
    for stream in streams:
        next(stream)
    mesh.processes[victim].kill()
    with ThreadPoolExecutor(len(streams)) as pool:
        results = list(pool.map(Stream.result, streams))
    mesh.restart(victim)
    mesh.wait_whole(60)
    return results


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_text_of_many_prompts_is_the_same_in_every_way_of_serving(
    mesh: LocalMesh, client: Client, sampling: SamplingParams
) -> None:
    prompts, sampling = spec_bench(60), replace(sampling, max_tokens=NUM_TOKENS)
    expected = tokens(plainly(client, prompts, sampling))
    assert tokens([ask(client, p, sampling) for p in prompts]) == expected
    with ThreadPoolExecutor(8) as pool:
        assert tokens(list(pool.map(lambda p: ask(client, p, sampling), prompts))) == expected
    orphans: list[Result] = []
    for first in range(0, len(prompts), 8):
        victim = f"verifier-{first // 8 % 2}"
        orphans += while_a_verifier_dies(mesh, client, prompts[first : first + 8], sampling, victim)
    assert tokens(orphans) == expected
    assert sum(result.samples[0].placements == 2 for result in orphans) >= len(prompts) // 4
    mesh.processes["ssm"].kill()
    assert tokens([ask(client, p, sampling) for p in prompts]) == expected


def generate_by_transformers(prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """The peer: Hugging Face's own greedy decoding in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from treecast.checkpoints import ensure_default_target

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(ensure_default_target(), dtype=torch.float32)
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        done = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens
        )
        outputs.append(done[0, len(prompt) :].tolist())
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 60], ids=["one", "many"])
def test_float32_text_is_that_of_transformers(count: int) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    with (
        LocalMesh(MeshSettings(dtype="float32")) as mesh,
        Client(mesh.router_address) as client,
    ):
        results = [ask(client, prompt, sampling) for prompt in spec_bench(count)]
    expected = generate_by_transformers([r.prompt_ids for r in results], NUM_TOKENS)
    assert [list(result.token_ids) for result in results] == expected
