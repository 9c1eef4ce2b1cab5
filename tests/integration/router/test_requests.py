"""What a request says on its way through the router, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from treecast.errors import InvalidRequest
from treecast.sampling.noise import noise_key
from treecast.sampling.params import Law, Proposal, SpeculationParams
from treecast.v1 import router_pb2 as pb
from treecast.v1 import sampling_pb2
from treecast.v1 import verifier_pb2 as verifier_pb
from treecast.wire.frames import Completed, FinishReason, Progress

from ...byte_tokenizer import BOS, TEMPLATE
from ..scripted_verifier import ScriptedVerifier, output_of, text_of
from .rig import HELLO, RouterClient, entries, routing

PROPOSAL_TOPK = sampling_pb2.PROPOSAL_TOPK


async def test_events_come_in_order_and_tokens_as_text(client: RouterClient) -> None:
    reply = await client.generate(request_id="r", sampling={"seed": 7}).read_all()
    kinds = [event.WhichOneof("event") for event in reply.events]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert set(kinds[1:-1]) == {"delta"}
    assert reply.of("started") == [
        pb.Started(
            request_id="r",
            seed=7,
            prompt_ids=HELLO,
            model="bytes",
            model_revision="r1",
            numerics_fingerprint="f1",
        )
    ]
    assert reply.tokens() == output_of(HELLO, 5)
    assert reply.text() == text_of(HELLO, 5)
    assert reply.finished == pb.Finished(
        reason=verifier_pb.FINISH_REASON_LENGTH,
        usage=verifier_pb.Usage(prompt_tokens=6, output_tokens=5, steps=5),
        placements=1,
        same_numerics=True,
    )


async def test_tokens_come_as_they_are_made(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.budget = 0
    reply = client.generate()
    for count in range(1, 5):
        verifier.allow(1)
        await reply.read_tokens(count)
        assert reply.tokens() == output_of(HELLO, count)
        assert reply.text() == text_of(HELLO, count)
    verifier.allow(1)
    assert (await reply.read_all()).text() == text_of(HELLO, 5)


async def test_start_says_all_that_the_client_said(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    sampling = {
        "temperature": 0.8,
        "top_p": 0.95,
        "max_tokens": 3,
        "seed": 7,
        "stop": ["zz"],
        "logprobs": 2,
        "logit_bias": {5: 1.5},
    }
    reply = await client.generate(
        request_id="r",
        sampling=sampling,
        max_nodes=0,
        truncate_prompt=True,
        tokens={"ids": [1, 2]},
        proposal=PROPOSAL_TOPK,
        growth="<1,1,3>",
    ).read_all()
    [start] = verifier.started
    assert (start.request_id, start.prompt, start.committed) == ("r", (1, 2), ())
    assert start.session is None
    assert start.deadline_ms is None
    assert start.speculation == SpeculationParams(Law.REPLAY, Proposal.TOPK, "<1,1,3>", max_nodes=0)
    assert start.truncate_prompt
    assert start.noise_key == noise_key(7, 0)
    assert (start.sampling.temperature, start.sampling.top_p) == (0.8, 0.95)
    assert (start.sampling.stop, start.sampling.logit_bias) == (("zz",), {5: 1.5})
    assert [one.chosen for delta in reply.of("delta") for one in delta.logprobs] == [-0.5] * 3


async def test_seed_is_drawn_when_none_is_given(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    replies = [await client.generate().read_all() for _ in range(2)]
    seeds = [reply.of("started")[0].seed for reply in replies]
    assert seeds[0] != seeds[1]
    assert [start.noise_key for start in verifier.started] == [noise_key(seed) for seed in seeds]
    assert [start.sampling.seed for start in verifier.started] == seeds


async def test_chat_goes_through_the_models_template(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    await client.generate(chat=chat).read_all()
    assert verifier.started[0].prompt == (BOS, *b"u:hi;a:")


async def test_tokenizer_is_fetched_when_it_is_larger_than_other_messages(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    verifier.files.chat_template = "{# " + "x" * 5_000_000 + " #}" + TEMPLATE
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    await client.generate(chat=chat).read_all()
    assert verifier.started[0].prompt == (BOS, *b"u:hi;a:")


async def test_tokenizer_comes_from_another_verifier_when_the_first_hangs_up(
    start: Callable[..., Any],
) -> None:
    one = await start("v1")
    one.answers.clear()
    async with routing([one]) as client:
        reply = client.generate()
        await one.asked.wait()
        two = await start("v2")
        client.router.fleet.follow(entries(one, two))
        await client.streams(2)
        one.hang_up()
        assert (await reply.read_all()).tokens() == output_of(HELLO, 5)


async def test_stop_string_is_cut_and_text_before_it_kept(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    letters = text_of(HELLO, 5)

    async def stop_at_the_fourth(link: Any, start: Any) -> None:
        for index, token in enumerate(output_of(HELLO, 4)):
            link.send(Progress(start.handle, index, (token,)))
        link.send(Completed(start.handle, FinishReason.STOP_STRING, stop_characters=2))

    verifier.run = stop_at_the_fourth
    reply = await client.generate(sampling={"stop": [letters[2:4]]}).read_all()
    assert reply.text() == letters[:2]
    assert reply.tokens() == output_of(HELLO, 4)
    assert reply.finished.reason == verifier_pb.FINISH_REASON_STOP_STRING


async def test_text_that_might_have_been_a_stop_string_comes_with_the_end(
    client: RouterClient,
) -> None:
    letters = text_of(HELLO, 5)
    reply = await client.generate(sampling={"stop": [letters[-2:] + "~"]}).read_all()
    assert reply.text() == letters
    assert reply.of("delta")[-1] == pb.Delta(text=letters[-2:])


async def test_samples_share_a_session_and_have_noise_of_their_own(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    reply = await client.generate(
        request_id="r", num_samples=3, sampling={"seed": 7, "max_tokens": 2}
    ).read_all()
    assert [start.noise_key for start in verifier.started] == [noise_key(7, i) for i in range(3)]
    [key] = {start.session for start in verifier.started}
    assert (key.tenant, key.session_id) == ("samples/default", "r")
    for index in range(3):
        kinds = [e.WhichOneof("event") for e in reply.events if e.sample_index == index]
        assert kinds[0] == "started"
        assert kinds[-1] == "finished"
        assert reply.tokens(index) == output_of(HELLO, 2)
    await verifier.until(lambda: bool(verifier.forgotten))
    assert [forget.session for forget in verifier.forgotten] == [key]


async def test_output_is_tokens_alone_when_the_model_has_no_tokenizer(
    start: Callable[..., Any],
) -> None:
    toy = await start(model="toy")
    toy.files = verifier_pb.GetTokenizerResponse()
    async with routing([toy]) as client:
        reply = await client.generate(tokens={"ids": [1, 2]}).read_all()
        assert reply.tokens() == output_of([1, 2], 5)
        assert reply.text() == ""
        with pytest.raises(
            InvalidRequest, match=r"^model 'toy' has no tokenizer; send the prompt as token ids$"
        ):
            await client.generate(text="hello").read_all()
        with pytest.raises(
            InvalidRequest, match=r"^model 'toy' has no tokenizer; stop strings need one$"
        ):
            await client.generate(tokens={"ids": [1]}, sampling={"stop": ["x"]}).read_all()
        assert len(toy.started) == 1


async def test_resumed_stream_says_only_what_is_new(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    whole = output_of(HELLO, 5)
    reply = await client.generate(
        tokens={"ids": HELLO},
        resume={
            "committed": whole[:2],
            "model_revision": "r1",
            "numerics_fingerprint": "f1",
        },
    ).read_all()
    assert verifier.started[0].committed == tuple(whole[:2])
    assert reply.tokens() == whole[2:]
    assert reply.text() == text_of(HELLO, 5)[2:]
    assert reply.finished.same_numerics


async def test_resumed_text_is_seamless_when_it_was_cut_within_a_character(
    verifier: ScriptedVerifier, client: RouterClient
) -> None:
    euro = "€".encode()

    async def the_third(link: Any, start: Any) -> None:
        link.send(Progress(start.handle, 2, (euro[2],)))
        link.send(Completed(start.handle, FinishReason.LENGTH))

    verifier.run = the_third
    reply = await client.generate(resume={"committed": euro[:2]}).read_all()
    assert reply.text() == "€"


async def test_resumed_result_says_so_when_numerics_have_changed(client: RouterClient) -> None:
    reply = await client.generate(
        resume={"committed": output_of(HELLO, 2), "numerics_fingerprint": "f0"}
    ).read_all()
    assert not reply.finished.same_numerics
