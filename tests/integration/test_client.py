"""Both clients against a router on a real port that says what the test tells it to."""

from __future__ import annotations

import asyncio
import re

import pytest

from tests.scripted_router import ScriptedRouter, delta, fail, finished, hang, play, started
from treecast import AsyncClient, Client, SamplingParams
from treecast.client import Chunk, FinishReason, Law, Result, RetryPolicy
from treecast.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    QuotaExceeded,
    TreecastError,
    Unavailable,
)

QUICK = RetryPolicy(attempts_to_start=2, attempts=3, first_backoff_s=0.01)
HELLO = play(started(), delta("Hel", 10), delta("lo", 11, 12), finished(3))


class BlockingCaller:
    """Drives the blocking client from a thread, so that one test serves both."""

    def __init__(self, *addresses: str) -> None:
        self._client = Client(addresses, QUICK)

    async def run(self, *args: object, **options: object) -> tuple[list[Chunk], Result]:
        def call() -> tuple[list[Chunk], Result]:
            with self._client as client:
                stream = client.generate(*args, **options)
                return list(stream), stream.result()

        return await asyncio.to_thread(call)


class AsyncCaller:
    def __init__(self, *addresses: str) -> None:
        self._client = AsyncClient(addresses, QUICK)

    async def run(self, *args: object, **options: object) -> tuple[list[Chunk], Result]:
        async with self._client as client:
            stream = client.generate(*args, **options)
            return [chunk async for chunk in stream], await stream.result()


@pytest.fixture(params=[BlockingCaller, AsyncCaller], ids=["Client", "AsyncClient"])
def caller(request: pytest.FixtureRequest) -> type[BlockingCaller | AsyncCaller]:
    return request.param


async def test_generate_yields_chunks_and_a_result_when_all_is_well(caller):
    with ScriptedRouter(HELLO) as router:
        chunks, result = await caller(router.address).run("Say hello")
    assert chunks == [Chunk("Hel", (10,)), Chunk("lo", (11, 12))]
    assert (result.text, result.token_ids) == ("Hello", (10, 11, 12))
    assert (result.request_id, result.seed, result.prompt_ids) == ("q1", 7, (5, 6))
    assert (result.model_revision, result.numerics_fingerprint) == ("r1", "f1")
    assert result.finish_reason is FinishReason.LENGTH
    assert (result.usage.steps, result.usage.drafted, result.usage.accepted) == (2, 5, 1)
    assert (result.usage.offered_by_depth, result.usage.accepted_by_depth) == ((2, 1), (1, 0))
    assert result.resumes == 0


async def test_the_request_carries_every_option_when_they_are_given(caller):
    with ScriptedRouter(HELLO) as router:
        await caller(router.address).run(
            [{"role": "user", "content": "Hi"}],
            SamplingParams(temperature=0, max_tokens=3, stop=("x",)),
            session_id="s1",
            priority=-2,
            timeout_s=30,
            max_nodes=0,
            num_samples=1,
            request_id="mine",
            model="toy",
            law=Law.MSS,
            growth="<2,2>",
            truncate_prompt=True,
        )
    (sent,) = router.requests
    assert [(m.role, m.content) for m in sent.chat.messages] == [("user", "Hi")]
    assert sent.sampling.HasField("temperature")
    assert (sent.sampling.temperature, sent.sampling.max_tokens) == (0, 3)
    assert (sent.session_id, sent.priority, sent.request_id) == ("s1", -2, "mine")
    assert sent.HasField("max_nodes")
    assert (sent.max_nodes, sent.num_samples, sent.model) == (0, 1, "toy")
    assert (sent.law, sent.proposal, sent.growth) == (2, 4, "<2,2>")
    assert sent.truncate_prompt


async def test_samples_are_kept_apart_when_several_were_asked_for(caller):
    script = play(
        started(),
        started(sample_index=1),
        delta("a", 1, sample_index=1),
        delta("b", 2),
        finished(1, sample_index=1),
        finished(1),
    )
    with ScriptedRouter(script) as router:
        chunks, result = await caller(router.address).run([5, 6], num_samples=2)
    assert [(chunk.sample_index, chunk.text) for chunk in chunks] == [(1, "a"), (0, "b")]
    assert [(s.index, s.text, s.token_ids) for s in result.samples] == [
        (0, "b", (2,)),
        (1, "a", (1,)),
    ]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PromptTooLong("prompt has 9012 tokens; the limit is 8192"), PromptTooLong),
        (InvalidRequest("top_p is 2; allowed: (0, 1]"), InvalidRequest),
        (Overloaded("queue is full", retry_after_s=2.5), Overloaded),
    ],
)
async def test_the_error_keeps_its_type_and_message_when_the_router_refuses(caller, error, kind):
    with ScriptedRouter(fail(error)) as router:
        with pytest.raises(kind) as caught:
            await caller(router.address).run("x")
        assert len(router.requests) == 1
    assert caught.value.message == error.message
    assert type(caught.value) is kind
    assert getattr(caught.value, "retry_after_s", None) == getattr(error, "retry_after_s", None)


async def test_the_text_goes_on_when_the_router_is_lost_mid_stream(caller):
    lost = fail(Unavailable("gone"), started(), delta("Hel", 10))
    rest = play(started(request_id="other"), delta("lo", 11, 12), finished(3))
    with ScriptedRouter(lost, rest) as router:
        chunks, result = await caller(router.address).run("Say hello", SamplingParams(max_tokens=3))
    assert [chunk.text for chunk in chunks] == ["Hel", "lo"]
    assert (result.text, result.token_ids, result.resumes) == ("Hello", (10, 11, 12), 1)
    first, second = router.requests
    assert not first.HasField("resume")
    assert list(second.resume.committed) == [10]
    assert (second.resume.model_revision, second.resume.numerics_fingerprint) == ("r1", "f1")
    assert list(second.tokens.ids) == [5, 6]
    assert (second.request_id, second.sampling.seed) == ("q1", 7)
    assert second.sampling.max_tokens == 3


async def test_another_router_takes_over_when_the_first_dies(caller):
    lost = fail(Unavailable("gone"), started(), delta("Hel", 10))
    rest = play(started(), delta("lo", 11, 12), finished(3))
    with ScriptedRouter(lost) as first, ScriptedRouter(rest) as second:
        _, result = await caller(first.address, second.address).run("Say hello")
    assert result.text == "Hello"
    assert (len(first.requests), len(second.requests)) == (1, 1)
    assert list(second.requests[0].resume.committed) == [10]


@pytest.mark.parametrize(
    "refusal", [Overloaded("queue is full", 0.01), QuotaExceeded("1 requests are running", 0.01)]
)
async def test_a_begun_stream_goes_on_when_its_router_is_full_for_a_moment(caller, refusal):
    lost = fail(Unavailable("gone"), started(), delta("Hel", 10))
    rest = play(started(), delta("lo", 11, 12), finished(3))
    with ScriptedRouter(lost, fail(refusal), rest) as router:
        _, result = await caller(router.address).run("Say hello")
    assert (result.text, len(router.requests)) == ("Hello", 3)


async def test_the_texts_end_is_told_once_when_the_router_is_lost_before_it_says_so(caller):
    """What is held back until the end comes without a token; it comes again from the next one."""
    lost = fail(Unavailable("gone"), started(), delta("Hel", 10), delta("lo", 11), delta("\n"))
    rest = play(started(), delta("\n"), finished(2))
    with ScriptedRouter(lost, rest) as router:
        chunks, result = await caller(router.address).run("Say hello")
    assert (result.text, result.token_ids) == ("Hello\n", (10, 11))
    assert "".join(chunk.text for chunk in chunks) == "Hello\n"


async def test_every_sample_goes_on_when_the_router_is_lost_with_several(caller):
    lost = fail(
        Unavailable("gone"),
        started(),
        started(sample_index=1),
        delta("ab", 1, 2),
        delta("x", 8, sample_index=1),
        finished(1, sample_index=1),
    )
    again = play(
        started(),
        started(sample_index=1),
        delta("a", 1),
        delta("bc", 2, 3),
        delta("x", 8, sample_index=1),
        finished(1, sample_index=1),
        finished(3),
    )
    with ScriptedRouter(lost, again) as router:
        chunks, result = await caller(router.address).run("x", num_samples=2)
    assert [(c.text, c.token_ids) for c in chunks] == [("ab", (1, 2)), ("x", (8,)), ("c", (3,))]
    assert [sample.text for sample in result.samples] == ["abc", "x"]
    assert router.requests[1].sampling.seed == 7
    assert not router.requests[1].HasField("resume")


async def test_samples_are_not_patched_together_when_their_tokens_come_out_otherwise(caller):
    lost = fail(Unavailable("gone"), started(), started(sample_index=1), delta("a", 1))
    other = play(started(), started(sample_index=1), delta("z", 9), finished(1))
    with ScriptedRouter(lost, other) as router:
        with pytest.raises(TreecastError, match="its tokens came out otherwise") as caught:
            await caller(router.address).run("x", num_samples=2)
        assert len(router.requests) == 2
    assert type(caught.value) is TreecastError


async def test_attempts_are_bounded_when_no_router_answers(caller):
    with ScriptedRouter(fail(Unavailable("no verifier is ready"))) as router:
        with pytest.raises(Unavailable) as caught:
            await caller(router.address).run("x")
        assert len(router.requests) == QUICK.attempts_to_start
    assert caught.value.message == f"router {router.address}: no verifier is ready"


async def test_attempts_are_bounded_when_a_begun_stream_finds_no_router(caller):
    lost = fail(Unavailable("gone"), started(), delta("Hel", 10))
    with ScriptedRouter(lost, fail(Unavailable("still gone"))) as router:
        with pytest.raises(Unavailable, match="still gone"):
            await caller(router.address).run("x")
        assert len(router.requests) == QUICK.attempts


async def test_the_stream_goes_on_when_a_router_ends_it_early(caller):
    rest = play(started(), delta("lo", 11, 12), finished(3))
    with ScriptedRouter(play(started(), delta("Hel", 10)), rest) as router:
        _, result = await caller(router.address).run("x")
    assert (result.text, result.resumes) == ("Hello", 1)
    assert list(router.requests[1].resume.committed) == [10]


async def test_the_deadline_holds_when_the_router_hangs(caller):
    with ScriptedRouter(hang(started())) as router:
        with pytest.raises(DeadlineExceeded):
            await caller(router.address).run("x", timeout_s=0.2)
        assert router.ended.wait(5)


async def test_the_deadline_is_told_at_once_when_it_comes_before_the_next_attempt(caller):
    crowded = fail(Overloaded("queue is full", 60.0), started(), delta("Hel", 10))
    with ScriptedRouter(crowded) as router:
        async with asyncio.timeout(15):
            with pytest.raises(
                DeadlineExceeded, match=r"in 60\.\d s; the last one .*queue is full$"
            ):
                await caller(router.address).run("x", timeout_s=30)
        assert len(router.requests) == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty; it needs at least one message or token id"),
        ([1, -2], "token id 1 of the prompt is -2; allowed: 0..2**32-1"),
        ([1, "a"], "token id 1 of the prompt is 'a'; allowed: 0..2**32-1"),
        ([{"role": "user"}], "message 0 of the prompt must have exactly role and content"),
        (7, "prompt is a int; allowed: str, list of messages, list of token ids"),
    ],
)
def test_a_prompt_is_refused_when_it_is_of_no_known_kind(prompt, message):
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest) as caught:
        client.generate(prompt)
    assert caught.value.message == message


def test_a_request_is_refused_when_a_number_does_not_fit():
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest, match="out of range"):
        client.generate("x", priority=2**40)


@pytest.mark.parametrize("after_s", [-1, 2**32, float("nan")])
async def test_a_drain_is_refused_when_its_time_does_not_fit(after_s):
    message = f"hand_over_after_s is {after_s:g}; allowed: 0..4294967"
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest, match=re.escape(message)):
        client.drain(hand_over_after_s=after_s)
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(InvalidRequest, match=re.escape(message)):
            await client.drain(hand_over_after_s=after_s)


@pytest.mark.parametrize("address", ["nowhere", "", "host:", ("a:1", "b")])
def test_an_address_is_refused_when_it_has_no_port(address):
    with pytest.raises(InvalidRequest, match="it must be host:port"):
        Client(address)


def test_the_environment_names_the_router_when_the_caller_does_not(monkeypatch):
    with ScriptedRouter(HELLO) as router:
        monkeypatch.setenv("TREECAST_ROUTER", router.address)
        with Client() as client:
            assert client.generate("x").result().text == "Hello"


def test_the_request_is_cancelled_when_the_caller_stops_reading():
    script = hang(started(), delta("Hel", 10))
    with ScriptedRouter(script) as router, Client(router.address, QUICK) as client:
        with client.generate("x") as stream:
            assert next(stream).text == "Hel"
            assert stream.request_id == "q1"
        assert router.ended.wait(5)
        with pytest.raises(Cancelled):
            stream.result()


def test_the_request_is_cancelled_when_the_stream_is_dropped():
    script = hang(started(), delta("Hel", 10))
    with ScriptedRouter(script) as router, Client(router.address, QUICK) as client:
        for _ in client.generate("x"):
            break
        assert router.ended.wait(5)


async def test_the_request_is_cancelled_when_the_async_stream_is_dropped():
    with ScriptedRouter(hang(started(), delta("Hel", 10))) as router:
        async with AsyncClient(router.address, QUICK) as client:
            async for _ in client.generate("x"):
                break
            assert await asyncio.to_thread(router.ended.wait, 5)


async def test_the_request_is_cancelled_when_the_reading_task_is():
    with ScriptedRouter(hang(started(), delta("Hel", 10))) as router:
        async with AsyncClient(router.address, QUICK) as client:
            first = asyncio.Event()

            async def read() -> None:
                async for _ in client.generate("x"):
                    first.set()

            task = asyncio.create_task(read())
            await asyncio.wait_for(first.wait(), 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(router.ended.wait, 5)


async def test_the_stream_ends_by_name_when_the_async_client_is_closed():
    with ScriptedRouter(hang(started(), delta("Hel", 10))) as router:
        client = AsyncClient(router.address, QUICK)
        stream = client.generate("x")
        await anext(stream)
        reading = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        await client.aclose()
        with pytest.raises(Cancelled, match=r"^the client was closed$"):
            await reading
        assert not reading.cancelled()


async def test_a_call_ends_by_name_when_the_async_client_is_closed():
    with ScriptedRouter(HELLO) as router:
        client = AsyncClient(router.address, QUICK)
        asking = asyncio.create_task(client.status())
        await asyncio.sleep(0)
        await client.aclose()
        with pytest.raises(Cancelled, match=r"^the client was closed$"):
            await asking


def test_status_and_models_are_told_when_asked_of_a_router():
    with ScriptedRouter(HELLO) as router, Client(router.address) as client:
        status, (model,) = client.status(), client.models()
        assert (client.abort("running"), client.abort("gone")) == (True, False)
        assert (client.close_session("known"), client.close_session("gone")) == (True, False)
    assert (status.queued, status.running, status.redis_ok) == (3, 1, True)
    assert status.verifiers[0].speculators == ("s1",)
    assert (model.name, model.context_tokens, model.verifiers) == ("toy", 512, 2)


async def test_status_and_models_are_told_when_asked_asynchronously():
    with ScriptedRouter(HELLO) as router:
        async with AsyncClient(router.address) as client:
            assert (await client.status()).queued == 3
            assert (await client.models())[0].name == "toy"
            assert await client.abort("running")
            assert await client.close_session("known")


def test_the_next_router_is_asked_when_the_first_is_down():
    with ScriptedRouter(HELLO) as gone:
        pass
    with ScriptedRouter(HELLO) as router, Client([gone.address, router.address]) as client:
        assert client.status().queued == 3


def test_the_outage_names_the_router_when_none_is_there():
    with ScriptedRouter(HELLO) as gone:
        pass
    with Client(gone.address, QUICK) as client, pytest.raises(Unavailable) as caught:
        client.status()
    assert caught.value.message.startswith(f"router {gone.address}: ")
