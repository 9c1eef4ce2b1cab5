"""Rounds from a step to the caller, through a whole mesh on real ports."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator

import pytest

from treecast.client import AsyncClient, Law, Result, SamplingParams
from treecast.wire.rounds import MAX_ROUNDS

from .toy_mesh import byte_mesh

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
PROMPT = "to be or not to be"


@pytest.fixture
async def client() -> AsyncIterator[AsyncClient]:
    async with byte_mesh() as address, AsyncClient(address) as client:
        yield client


def check_rounds(result: Result) -> None:
    """Rounds must tell the very output, and cost what the usage says."""
    rounds = [report.round for report in result.rounds]
    assert [token for one in rounds for token in one.tokens] == list(result.token_ids)
    assert [one.from_index for one in rounds] == [
        sum(len(earlier.tokens) for earlier in rounds[:at]) for at in range(len(rounds))
    ]
    assert len(rounds) == result.usage.steps
    assert sum(len(one.tree) for one in rounds) == result.usage.drafted
    assert sum(len(one.accepted) for one in rounds) == result.usage.accepted


async def test_rounds_tell_the_output_when_they_are_asked_for(client):
    result = await client.generate(PROMPT, GREEDY, report_rounds=True).result()
    check_rounds(result)
    assert result.usage.accepted > 0
    texts = "".join(report.text for report in result.rounds)
    assert result.text.startswith(texts)
    assert len(result.text) - len(texts) <= 3  # what a character that lacks bytes held back
    first = result.rounds[0].round
    assert first.prompt_tokens == len(result.prompt_ids) - 1


async def test_rounds_name_proposers_and_times_when_trees_were_drafted(client):
    result = await client.generate(PROMPT, GREEDY, report_rounds=True).result()
    rounds = [report.round for report in result.rounds if len(report.round.tree)]
    assert {name for one in rounds for name in one.proposers} == {"ssm", "ngram"}
    assert {draft.speculator for one in rounds for draft in one.drafts} <= {
        "speculator-0",
        "speculator-1",
    }
    for one in rounds:
        named = (1 << len(one.proposers)) - 1
        assert all(0 < bits <= named for bits in one.tree.proposers)
        assert all(draft.drafting_us > 0 and draft.num_nodes > 0 for draft in one.drafts)
    for before, after in itertools.pairwise(rounds):
        assert after.began_us >= before.began_us + before.waited_us + before.verified_us - 2


async def test_a_node_names_all_its_proposers_when_two_speculators_agree():
    async with byte_mesh(("ssm", "ssm")) as address, AsyncClient(address) as client:
        result = await client.generate(PROMPT, GREEDY, report_rounds=True).result()
    both = [report.round for report in result.rounds if len(report.round.drafts) == 2]
    assert both
    assert all(set(one.tree.proposers) == {0b11} for one in both)


@pytest.mark.parametrize("policy", ["tree", "spin", "vote"])
async def test_rounds_tell_the_output_when_another_policy_chooses(policy):
    async with byte_mesh(verifiers={"policy": policy}) as address, AsyncClient(address) as client:
        check_rounds(await client.generate(PROMPT, GREEDY, report_rounds=True).result())


async def test_rounds_tell_the_output_when_trees_are_draws():
    trusting = {"trusted_speculators": ("all",)}
    sampling = SamplingParams(temperature=1, seed=3, max_tokens=40, ignore_eos=True)
    async with byte_mesh(verifiers=trusting) as address, AsyncClient(address) as client:
        stream = client.generate(PROMPT, sampling, law=Law.MSS, report_rounds=True)
        check_rounds(await stream.result())


async def test_rounds_are_the_first_ones_when_there_are_too_many(client):
    sampling = SamplingParams(temperature=0, max_tokens=MAX_ROUNDS + 20, ignore_eos=True)
    stream = client.generate(PROMPT, sampling, max_nodes=0, report_rounds=True)
    result = await stream.result()
    assert result.usage.steps == MAX_ROUNDS + 20
    assert len(result.rounds) == MAX_ROUNDS
    told = [token for report in result.rounds for token in report.round.tokens]
    assert told == list(result.token_ids[:MAX_ROUNDS])


async def test_no_rounds_are_sent_when_nobody_asked(client):
    chunks = [chunk async for chunk in client.generate(PROMPT, GREEDY)]
    assert not any(chunk.rounds for chunk in chunks)


async def test_node_texts_are_those_of_the_tokens_when_there_is_a_tokenizer(client):
    result = await client.generate(PROMPT, GREEDY, report_rounds=True).result()
    for report in result.rounds:
        assert len(report.node_texts) == len(report.round.tree)
        for token, text in zip(report.round.tree.tokens, report.node_texts, strict=True):
            assert text == ({256: "<s>", 257: "</s>"}.get(token) or byte_text(token))


def byte_text(token: int) -> str:
    return bytes([token]).decode(errors="replace")


async def test_the_output_is_the_same_when_rounds_are_reported(client):
    sampling = SamplingParams(temperature=0.9, seed=3, max_tokens=30, ignore_eos=True)
    plain = await client.generate(PROMPT, sampling, max_nodes=0).result()
    told = await client.generate(PROMPT, sampling, report_rounds=True).result()
    assert told.token_ids == plain.token_ids
    check_rounds(told)


async def test_each_sample_has_its_rounds_when_there_are_several(client):
    sampling = SamplingParams(temperature=0.9, seed=3, max_tokens=12, ignore_eos=True)
    result = await client.generate(PROMPT, sampling, num_samples=2, report_rounds=True).result()
    for sample in result.samples:
        told = [token for report in sample.rounds for token in report.round.tokens]
        assert told == list(sample.token_ids)
