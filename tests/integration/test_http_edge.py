"""The OpenAI-compatible edge through its real port, called by OpenAI's own client, unmodified."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import openai
import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from treecast.adapter import Adapter
from treecast.bench.chaos import corpus
from treecast.bench.chaos.faults import Amounts
from treecast.bench.chaos.fuzz import Fuzzer
from treecast.errors import Cancelled, Overloaded, SettingsError, StaleLease, TreecastError
from treecast.sampling.logprobs import TokenLogprobs
from treecast.services.router.edge.errors import error_response
from treecast.services.router.edge.listener import HttpListener
from treecast.services.router.edge.schema import ChatAsked, CompletionAsked
from treecast.services.router.service import Call
from treecast.v1 import router_pb2 as pb
from treecast.wire.channel import MAX_MESSAGE_BYTES
from treecast.wire.frames import Completed, FinishReason, Progress, Usage

from ..byte_tokenizer import BOS
from .router.rig import HELLO, RouterClient, routing
from .scripted_verifier import ScriptedVerifier, output_of, text_of

HTTP = "127.0.0.1:0"
HI = [{"role": "user", "content": "hi"}]
CHAT = (BOS, *b"u:hi;a:")


class Edge:
    """A router with one verifier, and clients of its HTTP port."""

    def __init__(self, verifier: ScriptedVerifier, router: RouterClient) -> None:
        self.verifier = verifier
        self.router = router
        url = f"http://{router.router.presence.further['http']}"
        self.openai = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0)
        self.http = httpx2.AsyncClient(base_url=url, timeout=10)

    async def chat(self, **fields: Any) -> Any:
        return await self.openai.chat.completions.create(
            **{"model": "bytes", "messages": HI, "max_tokens": 5, "temperature": 0} | fields
        )

    async def complete(self, **fields: Any) -> Any:
        return await self.openai.completions.create(
            **{"model": "bytes", "prompt": "hello", "max_tokens": 5, "temperature": 0} | fields
        )

    async def post(self, **fields: Any) -> httpx2.Response:
        body = {"model": "bytes", "messages": HI, "max_tokens": 5} | fields
        return await self.http.post("/v1/chat/completions", json=body)


@asynccontextmanager
async def edge_of(verifier: ScriptedVerifier, **settings: Any) -> AsyncIterator[Edge]:
    async with routing([verifier], http_listen=HTTP, **settings) as router:
        edge = Edge(verifier, router)
        async with edge.openai, edge.http:
            yield edge


@pytest.fixture
async def edge() -> AsyncIterator[Edge]:
    async with ScriptedVerifier() as verifier, edge_of(verifier) as edge:
        yield edge


async def collect(stream: Any) -> list[Any]:
    return [chunk async for chunk in stream]


# --- what comes out ---------------------------------------------------------------------------


async def test_chat_is_answered_whole(edge: Edge) -> None:
    reply = await edge.chat()
    [choice] = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == text_of(CHAT, 5)
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert (reply.object, reply.model, reply.system_fingerprint) == (
        "chat.completion",
        "bytes",
        "f1",
    )
    assert reply.usage.prompt_tokens == len(CHAT)
    assert (reply.usage.completion_tokens, reply.usage.total_tokens) == (5, len(CHAT) + 5)


async def test_chat_is_streamed_token_by_token_with_usage_at_the_end(edge: Edge) -> None:
    edge.verifier.budget = 0
    stream = await asyncio.wait_for(
        edge.chat(stream=True, stream_options={"include_usage": True}), 10
    )
    first = await anext(stream)
    assert first.choices[0].delta.role == "assistant"
    letters = text_of(CHAT, 5)
    for letter in letters:
        edge.verifier.allow(1)
        assert (await anext(stream)).choices[0].delta.content == letter
    last, usage = await collect(stream)
    assert last.choices[0].finish_reason == "length"
    assert (usage.choices, usage.usage.completion_tokens) == ([], 5)
    assert last.usage is None


async def test_completion_is_answered_whole_and_streamed(edge: Edge) -> None:
    whole = await edge.complete()
    assert whole.choices[0].text == text_of(HELLO, 5)
    assert whole.object == "text_completion"
    chunks = await collect(await edge.complete(stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text_of(HELLO, 5)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


async def test_completion_takes_token_ids(edge: Edge) -> None:
    await edge.complete(prompt=[1, 2, 3])
    assert edge.verifier.started[0].prompt == (1, 2, 3)


async def test_logprobs_name_tokens_and_their_bytes_when_asked_for(edge: Edge) -> None:
    euro = (0xE2, 0x82, 0xAC)

    async def say_euro(link: Any, start: Any) -> None:
        for index, token in enumerate(euro):
            one = TokenLogprobs(-0.25, (token, 97), (-0.25, -2.0))
            link.send(Progress(start.handle, index, (token,), (one,)))
        usage = Usage(len(start.prompt), 0, 3, 3)
        link.send(Completed(start.handle, FinishReason.STOP_TOKEN, usage))

    edge.verifier.run = say_euro
    [choice] = (await edge.chat(logprobs=True, top_logprobs=2)).choices
    assert choice.message.content == "€"
    assert choice.finish_reason == "stop"
    content = choice.logprobs.content
    assert [entry.bytes for entry in content] == [[byte] for byte in euro]
    assert [entry.logprob for entry in content] == [-0.25] * 3
    tops = [[(top.bytes, top.logprob) for top in entry.top_logprobs] for entry in content]
    assert tops == [[([byte], -0.25), ([97], -2.0)] for byte in euro]
    assert edge.verifier.started[0].sampling.logprobs == 2


async def test_streamed_completions_logprobs_have_running_offsets(edge: Edge) -> None:
    chunks = await collect(await edge.complete(stream=True, logprobs=0))
    offsets = [at for chunk in chunks if (lp := chunk.choices[0].logprobs) for at in lp.text_offset]
    assert offsets == [0, 1, 2, 3, 4]
    [choice] = (await edge.complete(logprobs=0)).choices
    assert choice.logprobs.text_offset == offsets
    assert "".join(choice.logprobs.tokens) == choice.text


async def test_several_samples_are_choices_of_one_answer(edge: Edge) -> None:
    reply = await edge.chat(n=3)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert {choice.message.content for choice in reply.choices} == {text_of(CHAT, 5)}
    assert reply.usage.completion_tokens == 15
    chunks = await collect(await edge.chat(n=3, stream=True))
    texts = ["", "", ""]
    for chunk in chunks:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
    assert texts == [text_of(CHAT, 5)] * 3


async def test_models_are_listed_and_found_by_name(edge: Edge) -> None:
    [model] = (await edge.openai.models.list()).data
    assert (model.id, model.object) == ("bytes", "model")
    assert (await edge.openai.models.retrieve("bytes")).id == "bytes"
    with pytest.raises(openai.NotFoundError, match="served: bytes"):
        await edge.openai.models.retrieve("other/model")


async def test_health_is_answered_when_no_verifier_is_there() -> None:
    async with routing([], http_listen=HTTP) as router:
        url = f"http://{router.router.presence.further['http']}/healthz"
        async with httpx2.AsyncClient() as http:
            reply = await http.get(url)
    assert (reply.status_code, reply.text) == (200, "ok")


# --- what goes in -----------------------------------------------------------------------------


async def test_every_supported_field_reaches_the_verifier(edge: Edge) -> None:
    await edge.chat(
        temperature=0.8,
        top_p=0.95,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        logit_bias={"5": 1.5},
        seed=-1,
        stop=["zz"],
        max_completion_tokens=3,
        user="ada",
        extra_body={
            "top_k": 7,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "ignore_eos": True,
            "session_id": "s",
            "priority": 3,
            "max_tokens": None,
        },
    )
    [start] = edge.verifier.started
    sampling = start.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.8, 0.95, 7)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.1)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -0.5)
    assert (sampling.logit_bias, sampling.stop) == ({5: 1.5}, ("zz",))
    assert (sampling.seed, sampling.max_tokens) == (2**64 - 1, 3)
    assert sampling.ignore_eos
    assert start.session.session_id == "s"


async def test_an_adapter_is_asked_for_by_its_name_as_the_model() -> None:
    adapters = (Adapter("pirate", "a1"), Adapter("poet", "a2"))
    async with ScriptedVerifier(adapters=adapters) as verifier, edge_of(verifier) as edge:
        assert (await edge.chat(model="pirate")).model == "pirate"
        assert (await edge.chat(model="bytes", extra_body={"adapter": "poet"})).model == "poet"
        assert (await edge.chat(model="bytes")).model == "bytes"
        assert [start.adapter for start in verifier.started] == ["pirate", "poet", ""]
        listed = {one.id: one for one in (await edge.openai.models.list()).data}
        assert set(listed) == {"bytes", "pirate", "poet"}
        assert listed["poet"].model_dump()["parent"] == "bytes"


async def test_message_parts_and_developers_are_read(edge: Edge) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    await edge.chat(
        messages=[{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]
    )
    assert edge.verifier.started[0].prompt == (BOS, *b"s:be;u:hi;a:")


async def test_callers_key_is_handed_over(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Call] = []
    serve = edge.router.router.service.generate

    async def watched(request: pb.GenerateRequest, call: Call) -> None:
        calls.append(call)
        await serve(request, call)

    monkeypatch.setattr(edge.router.router.service, "generate", watched)
    await edge.chat()
    metadata = (("authorization", "Bearer other"),)
    request = pb.GenerateRequest(text="hello", sampling={"max_tokens": 1})
    await edge.router.stub.Generate(request, metadata=metadata).read()
    assert [call.authorization for call in calls] == ["Bearer key", "Bearer other"]
    assert "key" not in repr(calls[0])


BAD_FIELDS: list[tuple[str, object, str | None]] = [
    ("tools", [{"type": "function"}], "unsupported_parameter"),
    ("response_format", {"type": "json_object"}, "unsupported_parameter"),
    ("temperatur", 0.5, "unsupported_parameter"),
    ("n", 17, "invalid_value"),
    ("max_tokens", 0, "invalid_value"),
    ("max_tokens", 2**40, "invalid_value"),
    ("temperature", "0.5", "invalid_value"),
    ("stream", 1, "invalid_value"),
    ("seed", 2**64, "invalid_value"),
    ("logit_bias", {"-1": 1.0}, "invalid_value"),
    ("logit_bias", {str(token): 1.0 for token in range(1025)}, "invalid_value"),
    ("top_logprobs", 2, None),
    ("messages", None, "missing_required_parameter"),
    ("messages", [], None),
    ("messages", [{"role": "tool", "content": "x"}], "invalid_value"),
    ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "invalid_value"),
    ("temperature", 1e300, None),
    ("top_p", 0.0, None),
    ("stop", ["x" * 257], None),
]


async def test_bad_fields_are_refused_by_name(edge: Edge) -> None:
    for field, value, code in BAD_FIELDS:
        reply = await edge.post(**{field: value})
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["code"] == code
        if code is not None:
            assert error["param"].startswith(field)
        word = "prompt" if field == "messages" and not code else field
        assert word in error["message"]
    assert not edge.verifier.started


ALL_FAULTS: list[dict[str, Any]] = [
    {"messages": [{}] * 5000},
    {"messages": [{"role": "user", "content": [0] * 5000}]},
    {"messages": [{**HI[0], **dict.fromkeys(map(str, range(5000)), 1)}]},
    {"messages": HI, "stop": [0] * 5000},
    {"messages": HI, "logit_bias": {f"x{number}": 1 for number in range(5000)}},
    {"messages": HI, **dict.fromkeys(map(str, range(5000)), 1)},
]


@pytest.mark.parametrize("fields", ALL_FAULTS, ids=lambda fields: list(fields)[-1])
def test_few_faults_are_collected_when_a_body_holds_thousands(fields: dict[str, Any]) -> None:
    body = json.dumps({"model": "bytes", **fields})
    with pytest.raises(ValidationError) as refusal:
        ChatAsked.model_validate_json(body)
    assert refusal.value.error_count() <= 2


def test_tokens_are_read_up_to_the_first_fault() -> None:
    with pytest.raises(ValidationError) as refusal:
        CompletionAsked.model_validate_json(json.dumps({"model": "bytes", "prompt": [-1] * 5000}))
    assert refusal.value.error_count() == 2  # neither a text nor tokens


async def test_bodies_that_are_no_request_are_refused(edge: Edge) -> None:
    headers = {"content-type": "application/json"}
    surrogate, nan = b'{"model": "\\ud800"}', b'{"top_p": NaN}'
    for body in (b"", b"{", b"[]", b"\xff", surrogate, b"[" * 100_000, nan):
        reply = await edge.http.post("/v1/chat/completions", content=body, headers=headers)
        assert reply.status_code == 400
        assert reply.json()["error"]["type"] == "invalid_request_error"


async def test_other_content_types_paths_and_methods_are_refused(edge: Edge) -> None:
    plain = await edge.http.post("/v1/chat/completions", content=b"{}")
    assert (plain.status_code, "content-type" in plain.text) == (400, True)
    for reply, status in (
        (await edge.http.get("/v1/nothing"), 404),
        (await edge.http.get("/v1/chat/completions"), 405),
    ):
        assert reply.status_code == status
        assert reply.json()["error"]["type"] == "invalid_request_error"


async def test_large_body_is_refused_before_it_is_read(edge: Edge) -> None:
    address = edge.router.router.presence.further["http"]
    reader, writer = await asyncio.open_connection(*address.split(":"))
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {MAX_MESSAGE_BYTES + 1}\r\n\r\n"
    )
    writer.write(head.encode())
    # No byte of the body is ever sent.
    status = await asyncio.wait_for(reader.readline(), 10)
    writer.close()
    assert b" 413 " in status


async def test_chunked_body_is_refused_when_it_grows_too_large(edge: Edge) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(MAX_MESSAGE_BYTES // 2**16 + 1):
            yield b" " * 2**16

    headers = {"content-type": "application/json"}
    reply = await edge.http.post("/v1/completions", content=endless(), headers=headers)
    assert reply.status_code == 413


# --- what goes wrong --------------------------------------------------------------------------


async def test_unknown_model_is_not_found(edge: Edge) -> None:
    with pytest.raises(openai.NotFoundError, match="'other' is not served") as caught:
        await edge.chat(model="other")
    assert caught.value.code == "model_not_found"


async def test_prompt_beyond_the_context_is_refused(edge: Edge) -> None:
    with pytest.raises(openai.BadRequestError, match="the limit is 512") as caught:
        await edge.complete(prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"


async def test_overload_says_when_to_come_again(edge: Edge) -> None:
    edge.verifier.refusal = Overloaded("pool is full", 2.5)
    reply = await edge.post()
    assert reply.status_code == 429
    assert reply.headers["retry-after-ms"] == "2500"
    assert reply.json()["error"]["type"] == "rate_limit_error"


async def test_no_verifier_is_service_unavailable() -> None:
    async with routing([], http_listen=HTTP, verifier_grace_s=0.01) as router:
        url = f"http://{router.router.presence.further['http']}/v1/completions"
        async with httpx2.AsyncClient() as http:
            reply = await http.post(url, json={"model": "bytes", "prompt": "x"})
    assert reply.status_code == 503
    assert reply.headers["retry-after"] == "1"


async def test_error_after_the_first_event_ends_the_stream_with_it(edge: Edge) -> None:
    edge.verifier.budget = 0
    stream = await edge.chat(stream=True)
    await anext(stream)
    await edge.verifier.until(lambda: bool(edge.verifier.started))
    edge.verifier.fail(edge.verifier.started[0].handle, Overloaded("pool is full"))
    with pytest.raises(openai.APIError, match="pool is full"):
        await collect(stream)


async def test_text_of_unexpected_errors_stays_inside(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(request: pb.GenerateRequest, call: Call) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(edge.router.router.service, "generate", broken)
    reply = await edge.post()
    assert (reply.status_code, "secret" in reply.text) == (500, False)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_request_is_cancelled_when_its_client_leaves(edge: Edge, stream: bool) -> None:
    edge.verifier.budget = 0
    asking = asyncio.create_task(edge.post(stream=stream))
    await edge.verifier.until(lambda: bool(edge.verifier.started))
    asking.cancel()
    await edge.verifier.until(lambda: bool(edge.verifier.cancelled))
    await edge.router.router.service.wait_idle(10)
    assert edge.router.metric("requests_total", outcome="client_gone") == 1


async def test_queued_request_is_cancelled_when_its_client_leaves() -> None:
    async with ScriptedVerifier(capacity=1, budget=0) as verifier, edge_of(verifier) as edge:
        held = asyncio.create_task(edge.post())
        await verifier.until(lambda: bool(verifier.started))
        asking = asyncio.create_task(edge.post())
        await edge.router.queued(1)
        asking.cancel()
        await edge.router.queued(0)
        verifier.allow(5)
        assert (await held).status_code == 200


async def test_requests_are_refused_and_running_ones_end_when_the_router_drains(edge: Edge) -> None:
    edge.verifier.budget = 0
    stream = await edge.chat(stream=True)
    draining = asyncio.create_task(edge.router.router.drain())
    while not edge.router.router.service.draining:
        await asyncio.sleep(0)
    refused = await edge.post()
    assert (refused.status_code, "draining" in refused.text) == (503, True)
    edge.verifier.allow(5)
    chunks = await collect(stream)
    await draining
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(CHAT, 5)


async def test_stale_leases_are_borne_as_by_grpc(edge: Edge) -> None:
    edge.verifier.refusal = StaleLease("newer")
    assert (await edge.post()).status_code == 500


async def test_start_fails_when_the_http_address_is_taken(edge: Edge) -> None:
    taken = edge.router.router.presence.further["http"]
    with pytest.raises(SettingsError, match=f"http_listen {taken} cannot be bound"):
        await HttpListener(lambda *asgi: None, taken).start()  # type: ignore[arg-type]


async def test_nothing_of_a_request_is_logged(
    edge: Edge, capfd: pytest.CaptureFixture[str]
) -> None:
    await edge.chat(messages=[{"role": "user", "content": "hush"}])
    await edge.post(messages=[{"role": "hush", "content": "hush"}])
    captured = capfd.readouterr()
    assert "hush" not in captured.out + captured.err


async def test_output_equals_grpcs_for_the_same_seed(edge: Edge) -> None:
    http = await edge.complete(seed=7)
    grpc = await edge.router.generate(sampling={"seed": 7}).read_all()
    assert http.choices[0].text == grpc.text() == bytes(output_of(HELLO, 5)).decode()


async def test_fuzzed_bodies_are_refused_by_name_and_harm_nobody() -> None:
    fuzzer = Fuzzer(Amounts(seed=3))
    with capture_logs() as logs:
        async with ScriptedVerifier(model="toy") as verifier, edge_of(verifier) as edge:
            await fuzzer.edge(edge.http.base_url.netloc.decode(), 160)
            assert (await edge.chat(model="toy")).choices[0].message.content == text_of(CHAT, 5)
    assert {path: fuzzer.sent[path] for path, _ in corpus.EDGE} == dict.fromkeys(
        (path for path, _ in corpus.EDGE), 80
    )
    assert {"HTTP 200", "HTTP 400"} <= fuzzer.answers.keys()
    assert "HTTP 500" not in fuzzer.answers, fuzzer.answers
    assert not [entry for entry in logs if entry["log_level"] == "error"]


@pytest.mark.parametrize(
    ("error", "said"), [(Cancelled("it was aborted"), "false"), (Overloaded("queue is full"), None)]
)
def test_clients_are_told_not_to_ask_again_for_what_was_aborted(
    error: TreecastError, said: str | None
) -> None:
    """OpenAI's asks again after a 409 by itself."""
    assert error_response(error).headers.get("x-should-retry") == said
