"""Strangers at the router's port: keys, quotas, and a fair share of a busy mesh."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_status import rpc_status

from treecast import AsyncClient, SamplingParams
from treecast.client import RetryPolicy
from treecast.errors import (
    Cancelled,
    DuplicateRequest,
    InvalidRequest,
    Overloaded,
    PermissionDenied,
    QuotaExceeded,
    TreecastError,
    Unauthenticated,
)
from treecast.services.router.keys import entry_of
from treecast.v1 import router_pb2 as pb
from treecast.wire.frames import Start
from treecast.wire.status import from_rpc_error

from .router.rig import Reply, RouterClient, routing
from .scripted_verifier import ScriptedVerifier

KEYS = "\n".join(
    [
        entry_of("tc_light", "light", {}),
        entry_of("tc_heavy", "heavy", {}),
        entry_of("tc_admin", "ops", {}, admin=True),
        entry_of("tc_old", "old", {}, expires=datetime(2020, 1, 1, tzinfo=UTC)),
        entry_of("tc_rate", "rate", {"requests_per_minute": 2}),
        entry_of("tc_tokens", "tokens", {"tokens_per_minute": 20}),
        entry_of("tc_one", "one", {"max_concurrency": 1}),
        entry_of("tc_meek", "meek", {"max_priority": -1}),
    ]
)


@pytest.fixture
async def verifier(start: Callable[..., Any]) -> ScriptedVerifier:
    return await start()


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Any]]:
    """Starts verifiers that end with the test."""
    async with AsyncExitStack() as stack:

        async def start(name: str = "v1", **options: Any) -> ScriptedVerifier:
            return await stack.enter_async_context(ScriptedVerifier(name, **options))

        yield start


def generate(client: RouterClient, key: str | None, **request: Any) -> Reply:
    """As `RouterClient.generate`, with a key."""
    base = {"text": "hello", "sampling": {"temperature": 0, "max_tokens": 5}} | request
    metadata = () if key is None else (("authorization", f"Bearer {key}"),)
    return Reply(client.stub.Generate(pb.GenerateRequest(**base), metadata=metadata))


async def refusal(client: RouterClient, key: str | None, **request: Any) -> TreecastError:
    with pytest.raises(TreecastError) as refused:
        await generate(client, key, **request).read_all()
    return refused.value


# --- who calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (None, "API key is missing; send metadata authorization: Bearer KEY"),
        ("tc_nobody", "API key is unknown"),
        ("tc_old", "API key of tenant 'old' expired at 2020-01-01T00:00:00+00:00"),
    ],
)
async def test_request_is_refused_when_its_key_is_not_good(
    verifier: ScriptedVerifier, key: str | None, message: str
) -> None:
    async with routing([verifier], api_keys=KEYS) as client:
        error = await refusal(client, key)
        assert (type(error), error.message) == (Unauthenticated, message)
        for call in (
            client.stub.GetStatus(pb.GetStatusRequest()),
            client.stub.ListModels(pb.ListModelsRequest()),
            client.stub.Abort(pb.AbortRequest()),
            client.stub.CloseSession(pb.CloseSessionRequest(session_id="s")),
            client.stub.Drain(pb.DrainRequest()),
            client.stub.Resume(pb.ResumeRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert type(from_rpc_error(refused.value)) is Unauthenticated
    assert verifier.started == []


async def test_client_sends_its_key_with_every_call(
    verifier: ScriptedVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with routing([verifier], api_keys=KEYS) as router:
        address = router.router.address
        async with AsyncClient(address, api_key="tc_light") as client:
            assert (await client.generate("hello", SamplingParams(max_tokens=3)).result()).text
            assert await client.models()
        monkeypatch.setenv("TREECAST_API_KEY", "tc_admin")
        async with AsyncClient(address) as client:
            assert (await client.status()).verifiers
            assert await client.drain() == 0
        monkeypatch.setenv("TREECAST_API_KEY", "tc_other")
        async with AsyncClient(address, RetryPolicy(attempts_to_start=1)) as client:
            with pytest.raises(Unauthenticated, match=r"^API key is unknown$"):
                await client.status()


async def test_tenants_neither_see_nor_abort_one_another(verifier: ScriptedVerifier) -> None:
    verifier.budget = 0
    async with routing([verifier], api_keys=KEYS) as client:
        light = generate(client, "tc_light", request_id="r", session_id="s")
        heavy = generate(client, "tc_heavy", request_id="r", session_id="s")
        await verifier.until(lambda: len(verifier.started) == 2)
        assert await refusal(client, "tc_light", request_id="r") is not None
        sessions = {start.session for start in verifier.started}
        assert {session.tenant for session in sessions if session} == {"light", "heavy"}
        bearer = (("authorization", "Bearer tc_heavy"),)
        await client.stub.Abort(pb.AbortRequest(request_id="r"), metadata=bearer)
        with pytest.raises(Cancelled):
            await heavy.read_all()
        error = await refusal(client, "tc_light", request_id="r")
        assert type(error) is DuplicateRequest
        verifier.allow(100)
        await light.read_all()
        assert light.finished


# --- what they may use --------------------------------------------------------------------------


async def test_requests_over_the_rate_are_refused_with_when_to_come_back(
    verifier: ScriptedVerifier, empty_redis: str
) -> None:
    async with (
        routing([verifier], empty_redis, api_keys=KEYS) as one,
        routing([verifier], empty_redis, api_keys=KEYS) as two,
    ):
        await generate(one, "tc_rate").read_all()
        await generate(two, "tc_rate").read_all()
        for client in (one, two):
            error = await refusal(client, "tc_rate")
            assert isinstance(error, QuotaExceeded)
            wait_s = error.retry_after_s
            assert 20 < wait_s <= 30  # two a minute: the next comes after half of one
            assert error.message == (
                f"tenant 'rate' has used its 2 requests per minute; 1 more in {wait_s:.1f} s"
            )
        await generate(one, "tc_light").read_all()
        assert one.metric("requests_total", outcome="quota_exceeded") == 1


async def test_status_carries_the_code_and_retry_info_on_the_wire(
    verifier: ScriptedVerifier,
) -> None:
    async with routing([verifier], api_keys=KEYS) as client:
        for _ in range(2):
            await generate(client, "tc_rate").read_all()
        call = generate(client, "tc_rate").call
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        status = await rpc_status.aio.from_call(call)
        info, retry = ErrorInfo(), RetryInfo()
        assert status.details[0].Unpack(info)
        assert status.details[1].Unpack(retry)
        assert (info.reason, info.domain) == ("QUOTA_EXCEEDED", "treecast")
        assert 20 < retry.retry_delay.seconds <= 30


async def test_tokens_are_taken_by_what_was_output(verifier: ScriptedVerifier) -> None:
    """The prompt has 6 tokens, and 20 are there: 6 + 5 fits once, 6 + 15 never."""
    async with routing([verifier], api_keys=KEYS) as client:
        error = await refusal(client, "tc_tokens", sampling={"max_tokens": 15})
        assert (type(error), error.message) == (
            InvalidRequest,
            "prompt and output of the request are up to 21 tokens; "
            "tenant 'tokens' has 20 tokens per minute",
        )
        await generate(client, "tc_tokens").read_all()
        error = await refusal(client, "tc_tokens")
        assert isinstance(error, QuotaExceeded)
        assert error.message.startswith(
            "tenant 'tokens' has used its 20 tokens per minute; 11 more"
        )


async def test_tokens_come_back_when_a_request_is_cut_short(verifier: ScriptedVerifier) -> None:
    verifier.budget = 1
    async with routing([verifier], api_keys=KEYS) as client:
        reply = generate(client, "tc_tokens", request_id="r", sampling={"max_tokens": 14})
        await reply.read_tokens(1)
        bearer = (("authorization", "Bearer tc_tokens"),)
        await client.stub.Abort(pb.AbortRequest(request_id="r"), metadata=bearer)
        with pytest.raises(Cancelled):
            await reply.read_all()
        verifier.allow(100)
        await generate(client, "tc_tokens").read_all()  # 6 + 1 went, so 6 + 5 are there


async def test_concurrency_is_bounded(verifier: ScriptedVerifier) -> None:
    verifier.budget = 0
    async with routing([verifier], api_keys=KEYS) as client:
        running = generate(client, "tc_one")
        await verifier.until(lambda: len(verifier.started) == 1)
        error = await refusal(client, "tc_one")
        assert (type(error), error.message) == (
            QuotaExceeded,
            "tenant 'one' has 1 requests running; the limit is 1",
        )
        verifier.allow(100)
        await running.read_all()
        await generate(client, "tc_one").read_all()


async def test_priority_is_bounded(verifier: ScriptedVerifier) -> None:
    async with routing([verifier], api_keys=KEYS.replace("max_priority = -1", "")) as client:
        await generate(client, "tc_meek", priority=3).read_all()
    async with routing([verifier], api_keys=KEYS) as client:
        error = await refusal(client, "tc_meek")
        assert error.message == "priority is 0; tenant 'meek' may ask for -1 at most"


async def test_only_admins_drain(verifier: ScriptedVerifier) -> None:
    async with routing([verifier], api_keys=KEYS) as client:
        for call in (client.stub.Drain, client.stub.Resume):
            request = pb.DrainRequest() if call is client.stub.Drain else pb.ResumeRequest()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(request, metadata=(("authorization", "Bearer tc_light"),))
            error = from_rpc_error(refused.value)
            assert (type(error), error.message) == (
                PermissionDenied,
                "this needs an admin's key; tenant 'light' has none",
            )


async def test_prompt_is_refused_by_its_size_before_it_is_looked_at(
    verifier: ScriptedVerifier,
) -> None:
    async with routing([verifier]) as client:
        error = await refusal(client, None, text=None, tokens={"ids": [10**6] * 513})
        assert error.message == "prompt has 513 tokens; the limit is 512"
        chat = {"messages": [{"role": "user", "content": "a"}] * 4097}
        error = await refusal(client, None, text=None, chat=chat)
        assert error.message == "messages of the chat is 4097; allowed: 1..4096"
    assert verifier.started == []


# --- a fair share -------------------------------------------------------------------------------


async def serve_all(client: RouterClient, verifier: ScriptedVerifier, keys: list[str]) -> str:
    """Let requests wait in this order, then serve them one by one; returns whose came when."""
    verifier.budget = 0
    first = generate(client, "tc_admin", request_id="first")
    await verifier.until(lambda: len(verifier.started) == 1)
    waiting = []
    for number, key in enumerate(keys):
        waiting.append(generate(client, key, request_id=f"{key}-{number}"))
        await client.queued(number + 1)
    verifier.allow(10**6)
    for reply in (first, *waiting):
        await reply.read_all()
    return "".join(initial(start) for start in verifier.started[1:])


def initial(start: Start) -> str:
    return start.request_id.removeprefix("tc_")[0]


async def test_light_tenant_is_served_every_other_time_beside_a_neighbour_that_floods(
    start: Callable[..., Any],
) -> None:
    verifier = await start(capacity=1)
    async with routing([verifier], api_keys=KEYS) as client:
        order = await serve_all(client, verifier, ["tc_heavy"] * 10 + ["tc_light"] * 3)
    assert order == "lhlhlhhhhhhhh"


async def test_light_tenant_waits_behind_all_of_them_when_first_come_is_first_served(
    start: Callable[..., Any],
) -> None:
    """The negative control: without tenants of their own all are one queue."""
    one = entry_of("tc_heavy", "one", {}) + entry_of("tc_light", "one", {})
    verifier = await start(capacity=1)
    async with routing([verifier], api_keys=one + entry_of("tc_admin", "ops", {})) as client:
        order = await serve_all(client, verifier, ["tc_heavy"] * 10 + ["tc_light"] * 3)
    assert order == "h" * 10 + "lll"


async def test_flood_gives_way_when_the_queue_is_full(start: Callable[..., Any]) -> None:
    verifier = await start(capacity=1, budget=0)
    async with routing([verifier], api_keys=KEYS, queue_limit=3) as client:
        running = generate(client, "tc_admin")
        await verifier.until(lambda: len(verifier.started) == 1)
        flood = []
        for number in range(3):
            flood.append(generate(client, "tc_heavy"))
            await client.queued(number + 1)
        light = generate(client, "tc_light")
        with pytest.raises(Overloaded) as gave_way:
            await flood[-1].read_all()
        assert gave_way.value.message == (
            "queue is full; tenant 'heavy' had most of the requests in it, and this one gave way "
            "to another tenant's"
        )
        assert gave_way.value.retry_after_s == 1
        error = await refusal(client, "tc_heavy")
        assert error.message == (
            "queue has 3 requests, 2 of them of tenant 'heavy'; the limit is 3"
        )
        verifier.allow(1000)
        for reply in (running, light, *flood[:2]):
            await reply.read_all()
