"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import Self, TypeVar

import grpc

from treecast.errors import Cancelled, TreecastError, Unavailable
from treecast.sampling.params import Law, Proposal, SamplingParams, SpeculationParams
from treecast.v1 import router_pb2, router_pb2_grpc
from treecast.wire.channel import PROMPT, channel_options
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

ReplyT = TypeVar("ReplyT")
Stub = router_pb2_grpc.RouterServiceStub


class Stream:
    """A running generation: iterate over its chunks, then ask for `result()`.

    Closing the stream, an exception in its `with` block, or dropping it unfinished stops the
    request on the server too. Not thread-safe.
    """

    def __init__(
        self, routers: Connections[grpc.Channel], transcript: Transcript, attempts: Attempts
    ) -> None:
        self._transcript = transcript
        self._attempts = attempts
        # Not a method: a generator that held this object would keep a dropped stream running.
        self._chunks = _run(routers, transcript, attempts)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def request_id(self) -> str | None:
        """Known once the first response has come, or from the start if the caller chose it."""
        return self._transcript.request_id

    def result(self) -> Result:
        """Receive what is left and return the whole. Blocks.

        Raises:
            TreecastError: the request ended with an error, or was closed before its end.
        """
        for _ in self._chunks:
            pass
        if not self._transcript.complete:
            raise Cancelled("the stream was closed before the request had finished")
        return self._transcript.result(self._attempts.total_failures)

    def close(self) -> None:
        """Stop the request if it is running. Safe to call again."""
        self._chunks.close()


class Client:
    """Talks to a mesh through its router. Blocking; safe to share between threads.

    Example:
        with Client("127.0.0.1:7070") as client:
            for chunk in client.generate("Once upon a time"):
                print(chunk.text, end="")

    Args:
        address: "host:port", "dns:///name:port", several with commas between, or a list; by
            default that in TREECAST_ROUTER, else 127.0.0.1:7070. A stream that loses its router
            goes on through the next.
        retry: how hard to try when a router is lost.
        timeout_s: for every call but `generate`.
        api_key: by default that in TREECAST_API_KEY; none for a router that is open.
        tls: by default the files in TREECAST_TLS_CA, TREECAST_TLS_CERT and TREECAST_TLS_KEY; no
            file, as in TlsFiles(), connects in plaintext.
    Raises:
        InvalidRequest: an address is malformed. Connecting waits for the first call.
        SettingsError: the TLS files are unreadable or do not fit.
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; running streams end with an error."""
        for channel in self._routers.take_all():
            channel.close()

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
    ) -> Stream:
        """Start generating; nothing is sent before the first chunk is asked for.

        The prompt is text, a list of chat messages, or a list of token ids. `timeout_s` is for the
        whole request, over all attempts; the other options are those of `RequestOptions` and of
        `SpeculationParams`, whose proposal is by default the law's own.

        Raises:
            InvalidRequest: the prompt is of no known kind, a number does not fit its field, or the
                law cannot serve the proposal.
        """
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
        return Stream(self._routers, Transcript(request), Attempts(self._retry, timeout_s))

    def abort(self, request_id: str) -> bool:
        """Stop a running request. False if there is none of this id. Safe to retry."""
        request = router_pb2.AbortRequest(request_id=request_id)
        return self._call(lambda stub, given: stub.Abort(request, **given)).aborted

    def close_session(self, session_id: str) -> bool:
        """Free a session's KV cache. False if it is not known. Safe to retry."""
        request = router_pb2.CloseSessionRequest(session_id=session_id)
        return self._call(lambda stub, given: stub.CloseSession(request, **given)).closed

    def models(self) -> tuple[Model, ...]:
        """Models that can be asked for now."""
        request = router_pb2.ListModelsRequest()
        return read_models(self._call(lambda stub, given: stub.ListModels(request, **given)))

    def drain(self, target: str = "", hand_over_after_s: float | None = None) -> int:
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
        return (self._call(lambda stub, given: stub.Drain(request, **given))).running

    def resume(self, target: str = "") -> None:
        """Undo `drain`. Safe to retry."""
        request = router_pb2.ResumeRequest(target=target)
        self._call(lambda stub, given: stub.Resume(request, **given))

    def status(self) -> Status:
        """Workers, queue and load."""
        request = router_pb2.GetStatusRequest()
        return read_status(self._call(lambda stub, given: stub.GetStatus(request, **given)))

    def _call(self, ask: Callable[[Stub, CallOptions], ReplyT]) -> ReplyT:
        """Ask each router in turn until one answers."""
        given: CallOptions = {"timeout": self._timeout_s, "metadata": self._routers.metadata}
        for attempt in range(1, len(self._routers) + 1):
            address = self._routers.address
            try:
                return ask(Stub(self._routers.channel(address)), given)
            except grpc.RpcError as error:
                ours = name_router(from_rpc_error(error), address)
                if attempt == len(self._routers) or not isinstance(ours, Unavailable):
                    raise ours from error
                self._routers.leave(address)
        raise AssertionError("there is at least one router")


def _dial(address: str, tls: Tls | None) -> grpc.Channel:
    options = channel_options(address, pings=PROMPT)
    if tls is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, tls.channel_credentials(), options=options)


def _run(
    routers: Connections[grpc.Channel], transcript: Transcript, attempts: Attempts
) -> Generator[Chunk]:
    """Chunks of the whole request, over as many attempts as it takes."""
    while not transcript.complete:
        address = routers.address
        try:
            yield from _receive(routers, address, transcript, attempts)
        except TreecastError as error:
            if transcript.complete:
                return
            delay_s = attempts.failed(error, transcript)
            routers.leave(address)
            time.sleep(delay_s)


def _receive(
    routers: Connections[grpc.Channel], address: str, transcript: Transcript, attempts: Attempts
) -> Generator[Chunk]:
    """Chunks of one attempt, until its stream ends; gRPC's errors come out as ours."""
    timeout_s = attempts.remaining_s()
    call = Stub(routers.channel(address)).Generate(
        transcript.next_request(),
        timeout=timeout_s,
        metadata=(*routers.metadata, *caller_trace()),
    )
    try:
        for response in call:
            if (chunk := transcript.fold(response)) is not None:
                yield chunk
    except grpc.RpcError as error:
        raise name_router(from_rpc_error(error), address) from error
    finally:
        call.cancel()
    if not transcript.complete:
        raise Unavailable(f"router {address} ended the stream before the request had finished")
