"""What every service's server does: health, reflection, caps, binding, and errors as statuses."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from treecast.errors import InvalidRequest, Overloaded, SettingsError, TreecastError
from treecast.v1 import router_pb2 as pb
from treecast.v1.router_pb2_grpc import (
    RouterServiceServicer,
    RouterServiceStub,
    add_RouterServiceServicer_to_server,
)
from treecast.wire.channel import MAX_MESSAGE_BYTES, channel_options, open_channel
from treecast.wire.server import LIVE, Server
from treecast.wire.status import from_rpc_error

NAME = "treecast.v1.RouterService"


class Router(RouterServiceServicer):
    """Answers with what the test gives it, then raises what the test gives it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.cancelled = asyncio.Event()

    async def Abort(self, request: Any, context: Any) -> pb.AbortResponse:
        if self.error:
            raise self.error
        return pb.AbortResponse(aborted=True)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(sample_index=7)
        if self.error:
            raise self.error
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    async def CloseSession(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def ListModels(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def GetStatus(self, request: Any, context: Any) -> Any:
        raise NotImplementedError


@contextlib.asynccontextmanager
async def serving(router: Router) -> AsyncIterator[tuple[Server, str]]:
    server = Server()
    server.add(add_RouterServiceServicer_to_server, router, NAME)
    address = await server.listen("127.0.0.1:0")
    try:
        yield server, address
    finally:
        await server.stop()


async def unary(stub: Any) -> None:
    await stub.Abort(pb.AbortRequest(request_id="r"))


async def streaming(stub: Any) -> None:
    async for _ in stub.Generate(pb.GenerateRequest(text="x")):
        pass


async def error_of(address: str, call: Callable[[Any], Awaitable[None]]) -> TreecastError:
    async with open_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await call(RouterServiceStub(channel))
    return from_rpc_error(ended.value)


@pytest.mark.parametrize("call", [unary, streaming])
async def test_client_gets_the_error_when_a_handler_raises_it(
    call: Callable[[Any], Awaitable[None]],
) -> None:
    async with serving(Router(Overloaded("queue is full", 2.5))) as (_, address):
        error = await error_of(address, call)
        assert isinstance(error, Overloaded)
        assert (str(error), error.retry_after_s) == ("queue is full", 2.5)


@pytest.mark.parametrize("character", ["x", "%", "é", "日", "🙂"])
async def test_client_gets_the_error_when_its_message_is_long(character: str) -> None:
    async with serving(Router(InvalidRequest(character * 9000))) as (_, address):
        error = await error_of(address, unary)
        assert type(error) is InvalidRequest
        assert set(str(error)) == {character}


@pytest.mark.parametrize("call", [unary, streaming])
async def test_nothing_leaks_when_a_handler_fails(
    call: Callable[[Any], Awaitable[None]],
) -> None:
    async with serving(Router(KeyError("secret"))) as (_, address):
        error = await error_of(address, call)
        assert type(error) is TreecastError
        assert str(error) == "internal error"


@pytest.mark.parametrize(
    "method", [f"{NAME}/Abort", f"{NAME}/Generate", "grpc.health.v1.Health/Check"]
)
async def test_request_is_refused_by_name_when_it_cannot_be_parsed(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(Router()) as (_, address), open_channel(address) as channel:
        call: Any = channel.unary_stream(f"/{method}")(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
    error = from_rpc_error(refused.value)
    assert type(error) is InvalidRequest
    assert str(error) == "a message cannot be parsed"
    assert not caplog.records


async def test_handler_is_cancelled_when_the_client_goes() -> None:
    router = Router()
    async with serving(router) as (_, address), open_channel(address) as channel:
        call = RouterServiceStub(channel).Generate(pb.GenerateRequest(text="x"))
        assert (await call.read()).sample_index == 7
        call.cancel()
        await asyncio.wait_for(router.cancelled.wait(), 10)


async def test_request_is_refused_and_the_server_lives_when_it_is_over_the_cap() -> None:
    async with serving(Router()) as (_, address):
        async with open_channel(address, max_message_bytes=-1) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await RouterServiceStub(channel).Abort(
                    pb.AbortRequest(request_id="x" * MAX_MESSAGE_BYTES)
                )
            error = from_rpc_error(refused.value)
            assert type(error) is InvalidRequest
            assert f"larger than max ({MAX_MESSAGE_BYTES + 5} vs. {MAX_MESSAGE_BYTES})" in str(
                error
            )
        async with open_channel(address) as channel:
            assert (await RouterServiceStub(channel).Abort(pb.AbortRequest())).aborted


async def test_no_call_is_lost_when_more_come_at_once_than_the_loop_takes_up() -> None:
    """gRPC left to itself drops some from 1,000 on, and calls them cancelled."""
    async with serving(Router()) as (_, address):
        options = channel_options(address)
        channels = [grpc.insecure_channel(address, options=options) for _ in range(16)]
        calls = [
            RouterServiceStub(channel).Abort.future(pb.AbortRequest())
            for channel in channels
            for _ in range(100)  # of one connection at a time, by gRPC's own bound
        ]
        time.sleep(2)  # noqa: ASYNC251  all have come, and the event loop has taken up none
        answers = [await asyncio.to_thread(call.exception, 30) for call in calls]
        assert answers == [None] * len(calls)
        for channel in channels:
            channel.close()


@pytest.mark.slow
async def test_no_call_is_lost_when_the_loop_takes_none_up_for_over_half_a_minute() -> None:
    async with serving(Router()) as (_, address):
        with grpc.insecure_channel(address) as channel:
            stub: Any = RouterServiceStub(channel)
            calls = [stub.Abort.future(pb.AbortRequest(request_id="r")) for _ in range(8)]
            time.sleep(33)  # noqa: ASYNC251  this is the loop
            answers = await asyncio.gather(*(asyncio.to_thread(call.result, 10) for call in calls))
    assert all(answer.aborted for answer in answers)


async def test_health_follows_readiness_when_asked() -> None:
    async with serving(Router()) as (server, address), open_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def status(name: str) -> int:
            return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status

        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        serving_now = health_pb2.HealthCheckResponse.SERVING
        assert [await status(""), await status(NAME)] == [not_serving] * 2
        assert await status(LIVE) == serving_now
        await server.set_ready()
        assert [await status(""), await status(NAME)] == [serving_now] * 2
        await server.set_not_ready()
        assert [await status(""), await status(NAME)] == [not_serving] * 2
        assert (await RouterServiceStub(channel).Abort(pb.AbortRequest())).aborted


async def test_reflection_lists_the_services_when_asked() -> None:
    async with serving(Router()) as (_, address), open_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        async for response in stub.ServerReflectionInfo(asked):
            names = {service.name for service in response.list_services_response.service}
        assert {NAME, "grpc.health.v1.Health"} <= names


async def test_start_is_refused_by_name_when_the_address_is_in_use() -> None:
    async with serving(Router()) as (_, address):
        with pytest.raises(SettingsError) as refused:
            await Server().listen(address)
        assert str(refused.value) == f"cannot listen on {address}: address already in use"


async def test_start_is_refused_by_name_when_the_address_is_not_ours() -> None:
    with pytest.raises(SettingsError, match=r"cannot listen on 203\.0\.113\.1:0: "):
        await Server().listen("203.0.113.1:0")


async def test_start_is_refused_by_name_when_the_address_is_malformed() -> None:
    with pytest.raises(SettingsError, match=r"listen address is '127\.0\.0\.1:99999'; it must be"):
        await Server().listen("127.0.0.1:99999")


async def test_running_call_finishes_when_the_server_stops_with_grace() -> None:
    async with serving(Router()) as (server, address), open_channel(address) as channel:
        call = RouterServiceStub(channel).Generate(pb.GenerateRequest(text="x"))
        await call.read()
        stopping = asyncio.create_task(server.stop(grace_s=30))
        with pytest.raises(grpc.aio.AioRpcError):
            async with open_channel(address) as fresh:
                await RouterServiceStub(fresh).Abort(pb.AbortRequest())
        assert not stopping.done()
        call.cancel()
        await asyncio.wait_for(stopping, 10)


def test_channel_balances_when_the_name_is_a_dns_one() -> None:
    assert ("grpc.lb_policy_name", "round_robin") in channel_options("dns:///verifiers:80")
    assert ("grpc.lb_policy_name", "round_robin") not in channel_options("10.0.0.1:80")
