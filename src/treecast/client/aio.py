"""The asyncio client: `sync.py` with `await`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

import grpc

from treecast.errors import Cancelled, TreecastError, Unavailable
from treecast.sampling.params import Law, Proposal, SamplingParams, SpeculationParams
from treecast.v1 import router_pb2, router_pb2_grpc
from treecast.wire.channel import PROMPT, is_cancelled, open_channel
from treecast.wire.status import from_rpc_error
from treecast.wire.tls import Tls, TlsFiles

from .access import CallOptions, read_access
from .connections import Connections, name_router, router_addresses
from .replies import read_models, read_status
from .request import Prompt, RequestOptions, build_drain, build_request
from .results import Chunk, Model, Result, Status
from .retry import Attempts, RetryPolicy
from .trace_context import caller_trace
from .transcript import Transcript

if TYPE_CHECKING:
    from treecast.v1.router_pb2_grpc import RouterServiceAsyncStub as AsyncStub

ReplyT = TypeVar("ReplyT")


class AsyncStream:
    """A running generation: `async for` over its chunks, then `await result()`.

    Cancelling the task that reads it, closing it, an exception in its `async with` block, or
    dropping it unfinished stops the request on the server too.
    """

    def __init__(
        self, routers: Connections[grpc.aio.Channel], transcript: Transcript, attempts: Attempts
    ) -> None:
        self._transcript = transcript
        self._attempts = attempts
        # Not a method: a generator that held this object would keep a dropped stream running.
        self._chunks = _run(routers, transcript, attempts)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    @property
    def request_id(self) -> str | None:
        """Known once the first response has come, or from the start if the caller chose it."""
        return self._transcript.request_id

    async def result(self) -> Result:
        """Receive what is left and return the whole.

        Raises:
            TreecastError: the request ended with an error, or was closed before its end.
        """
        async for _ in self._chunks:
            pass
        if not self._transcript.complete:
            raise Cancelled("the stream was closed before the request had finished")
        return self._transcript.result(self._attempts.total_failures)

    async def aclose(self) -> None:
        """Stop the request if it is running. Safe to call again."""
        await self._chunks.aclose()


class AsyncClient:
    """Talks to a mesh through its router; one per event loop. Arguments as `Client`'s.

    Example:
        async with AsyncClient("127.0.0.1:7070") as client:
            async for chunk in client.generate("Once upon a time"):
                print(chunk.text, end="")
    """

    def __init__(
        self,
        address: str | Sequence[str] | None = None,
        retry: RetryPolicy | None = None,
        timeout_s: float = 10.0,
        *,
        api_key: str | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        self._routers = Connections(router_addresses(address), _dial, read_access(api_key, tls))
        self._retry = retry or RetryPolicy()
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections; running streams and calls end with Cancelled."""
        for channel in self._routers.take_all():
            await channel.close()

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        session_id: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
        max_nodes: int | None = None,
        num_samples: int | None = None,
        request_id: str | None = None,
        model: str | None = None,
        adapter: str | None = None,
        law: Law = Law.REPLAY,
        proposal: Proposal | None = None,
        growth: str = "",
        truncate_prompt: bool = False,
        report_rounds: bool = False,
    ) -> AsyncStream:
        """Start generating, as `Client.generate`; not a coroutine, nothing is sent yet."""
        options = RequestOptions(
            request_id=request_id,
            model=model,
            adapter=adapter,
            session_id=session_id,
            priority=priority,
            num_samples=num_samples,
            speculation=SpeculationParams.of(law, proposal, growth, max_nodes),
            truncate_prompt=truncate_prompt,
            report_rounds=report_rounds,
        )
        request = build_request(prompt, sampling or SamplingParams(), options)
        return AsyncStream(self._routers, Transcript(request), Attempts(self._retry, timeout_s))

    async def abort(self, request_id: str) -> bool:
        """Stop a running request. False if there is none of this id. Safe to retry."""
        request = router_pb2.AbortRequest(request_id=request_id)
        return (await self._call(lambda stub, given: stub.Abort(request, **given))).aborted

    async def close_session(self, session_id: str) -> bool:
        """Free a session's KV cache. False if it is not known. Safe to retry."""
        request = router_pb2.CloseSessionRequest(session_id=session_id)
        return (await self._call(lambda stub, given: stub.CloseSession(request, **given))).closed

    async def models(self) -> tuple[Model, ...]:
        """Models that can be asked for now."""
        request = router_pb2.ListModelsRequest()
        return read_models(await self._call(lambda stub, given: stub.ListModels(request, **given)))

    async def drain(self, target: str = "", hand_over_after_s: float | None = None) -> int:
        """Take a verifier, or the router, out of service: nothing new starts there.

        Needs an admin's key, if the router has keys. Returns at once. Safe to retry.

        Args:
            target: address or instance id of a verifier; empty for the router itself.
            hand_over_after_s: a verifier hands over what still runs then; None lets it finish.
        Returns:
            How many requests still run there.
        Raises:
            InvalidRequest: `hand_over_after_s` is below 0, or over 49 days.
        """
        request = build_drain(target, hand_over_after_s)
        return (await self._call(lambda stub, given: stub.Drain(request, **given))).running

    async def resume(self, target: str = "") -> None:
        """Undo `drain`. Safe to retry."""
        request = router_pb2.ResumeRequest(target=target)
        await self._call(lambda stub, given: stub.Resume(request, **given))

    async def status(self) -> Status:
        """Workers, queue and load."""
        request = router_pb2.GetStatusRequest()
        return read_status(await self._call(lambda stub, given: stub.GetStatus(request, **given)))

    async def _call(self, ask: Callable[[AsyncStub, CallOptions], Awaitable[ReplyT]]) -> ReplyT:
        """Ask each router in turn until one answers."""
        given: CallOptions = {"timeout": self._timeout_s, "metadata": self._routers.metadata}
        for attempt in range(1, len(self._routers) + 1):
            address = self._routers.address
            try:
                return await ask(_stub(self._routers.channel(address)), given)
            except grpc.aio.AioRpcError as error:
                ours = name_router(from_rpc_error(error), address)
                if attempt == len(self._routers) or not isinstance(ours, Unavailable):
                    raise ours from error
                self._routers.leave(address)
            except asyncio.CancelledError as error:
                raise _closed(error) from None
        raise AssertionError("there is at least one router")


async def _run(
    routers: Connections[grpc.aio.Channel], transcript: Transcript, attempts: Attempts
) -> AsyncGenerator[Chunk]:
    """Chunks of the whole request, over as many attempts as it takes."""
    while not transcript.complete:
        address = routers.address
        attempt = _receive(routers, address, transcript, attempts)
        try:
            async for chunk in attempt:
                yield chunk
        except TreecastError as error:
            if transcript.complete:
                return
            delay_s = attempts.failed(error, transcript)
            routers.leave(address)
            await asyncio.sleep(delay_s)
        finally:
            await attempt.aclose()


async def _receive(
    routers: Connections[grpc.aio.Channel], address: str, transcript: Transcript, attempts: Attempts
) -> AsyncGenerator[Chunk]:
    """Chunks of one attempt, until its stream ends; gRPC's errors come out as ours."""
    timeout_s = attempts.remaining_s()
    call = _stub(routers.channel(address)).Generate(
        transcript.next_request(),
        timeout=timeout_s,
        metadata=(*routers.metadata, *caller_trace()),
    )
    try:
        async for response in call:
            if (chunk := transcript.fold(response)) is not None:
                yield chunk
    except grpc.aio.AioRpcError as error:
        raise name_router(from_rpc_error(error), address) from error
    except asyncio.CancelledError as error:
        raise _closed(error) from None
    finally:
        call.cancel()
    if not transcript.complete:
        raise Unavailable(f"router {address} ended the stream before the request had finished")


def _closed(error: asyncio.CancelledError) -> BaseException:
    """What to raise for it: itself, if it is this task's, else the end of its channel."""
    return error if is_cancelled() else Cancelled("the client was closed")


def _dial(address: str, tls: Tls | None) -> grpc.aio.Channel:
    return open_channel(address, tls=tls, pings=PROMPT)


def _stub(channel: grpc.aio.Channel) -> AsyncStub:
    return router_pb2_grpc.RouterServiceStub(channel)
