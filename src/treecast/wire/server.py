"""A gRPC server as every service has it: health, reflection, size caps and the error table."""

from __future__ import annotations

import contextlib
import inspect
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from treecast.address import Address, parse_address
from treecast.errors import PermissionDenied, SettingsError
from treecast.wire.channel import (
    MAX_MESSAGE_BYTES,
    PATIENT,
    PROMPT_MS,
    Options,
)
from treecast.wire.status import abort
from treecast.wire.tls import Tls, role_of

Servicer = TypeVar("Servicer")
Context = grpc.aio.ServicerContext[Any, Any]

LIVE = "live"
"""A health name that is served from start to stop, ready or not: it says that the loop runs."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


MAX_PENDING_CALLS = 16_384
"""Calls that have come and wait for the event loop to take them up.

Left to itself gRPC drops some of them at random from 1,000 on, and all after half a minute, as if
their callers had cancelled them. A queue of ours refuses by name what is too much.
"""

MAX_PENDING_S = 24 * 3600
"""How long they wait; their callers have deadlines of their own."""


def server_options(max_answer_bytes: int = MAX_MESSAGE_BYTES) -> Options:
    return [
        ("grpc.max_send_message_length", max_answer_bytes),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        *PATIENT,
        ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
        ("grpc.server_max_unrequested_time_in_server", MAX_PENDING_S),
        ("grpc.http2.min_ping_interval_without_data_ms", PROMPT_MS // 2),
        # Two processes on one port would share its connections instead of failing at start.
        ("grpc.so_reuseport", 0),
    ]


class Server:
    """One grpc.aio server. Not ready (by `grpc.health.v1`) until told otherwise.

    Attributes:
        ready: what health says of it; set by `set_ready` and `set_not_ready` alone.
    """

    def __init__(
        self,
        *,
        tls: Tls | None = None,
        require_clients: bool = True,
        max_answer_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """What clients may send is capped at `MAX_MESSAGE_BYTES`, whatever they may be answered.

        Args:
            tls: our certificates; None serves in plaintext.
            require_clients: ask callers for certificates where their authority is known.
        """
        self._tls = tls
        self._require_clients = require_clients
        self._callers: dict[str, frozenset[str]] = {}
        enforced = self._callers if tls is not None and tls.mutual and require_clients else {}
        self._server = grpc.aio.server(
            interceptors=[ErrorInterceptor(enforced)], options=server_options(max_answer_bytes)
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._names: list[str] = []
        self.ready = False

    def add(
        self,
        register: Callable[[Servicer, grpc.aio.Server], None],
        servicer: Servicer,
        name: str,
        callers: Iterable[str] = (),
    ) -> None:
        """Serve one service; `name` is its full name, such as "treecast.v1.RouterService".

        Args:
            callers: roles that may call it where callers have certificates; none: all may.
        """
        register(servicer, self._server)
        self._names.append(name)
        if roles := frozenset(callers):
            self._callers[name] = roles

    async def listen(self, address: str) -> str:
        """Bind and start; returns the bound address, with the port that 0 stood for.

        Raises:
            SettingsError: the address is in use, not this machine's, or not HOST:PORT.
        """
        wanted = parse_address(address, "listen address")
        names = [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self._server)
        await self.set_not_ready()
        await self._health.set(LIVE, _SERVING)
        try:
            bound = wanted.with_port(self._bind(str(wanted)))
        except RuntimeError:
            raise SettingsError(f"cannot listen on {address}: {_why_not(wanted)}") from None
        await self._server.start()
        return str(bound)

    def _bind(self, address: str) -> int:
        if self._tls is None:
            return self._server.add_insecure_port(address)
        credentials = self._tls.server_credentials(self._require_clients)
        return self._server.add_secure_port(address, credentials)

    async def set_ready(self) -> None:
        self.ready = True
        await self._set_health(_SERVING)

    async def set_not_ready(self) -> None:
        """Ask balancers and probes to send nobody new; calls are still served."""
        self.ready = False
        await self._set_health(_NOT_SERVING)

    async def _set_health(self, status: int) -> None:
        for name in ("", *self._names):
            await self._health.set(name, status)

    async def stop(self, grace_s: float | None = None) -> None:
        """Not ready for good, take no new calls, and abort those that outlive the grace period.

        Close the pair streams first: they have no end of their own. Safe to repeat.
        """
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def wait(self) -> None:
        """Block until the server has stopped."""
        await self._server.wait_for_termination()


def _why_not(address: Address) -> str:
    """Bind once more by hand, since gRPC does not say what went wrong."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(where)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return "gRPC cannot bind it"


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what handlers raise into statuses by the one table in `status`.

    Before they run, callers are held to the roles that may call their service.
    """

    def __init__(self, callers: Mapping[str, frozenset[str]] | None = None) -> None:
        """`callers` by full name of the service; read at each call."""
        self._callers = callers if callers is not None else {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method's handler, whichever of the four kinds it is."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        service = handler_call_details.method.rpartition("/")[0].lstrip("/")
        check = _caller_check(service, self._callers.get(service))
        for kind, make in _MAKERS.items():
            call = getattr(handler, kind)
            if call is not None:
                deserialize = handler.request_deserializer
                if not handler.request_streaming:
                    deserialize = _late(deserialize)
                return make(_guard(call, check), deserialize, handler.response_serializer)
        return handler


_MAKERS = {
    "unary_unary": grpc.unary_unary_rpc_method_handler,
    "unary_stream": grpc.unary_stream_rpc_method_handler,
    "stream_unary": grpc.stream_unary_rpc_method_handler,
    "stream_stream": grpc.stream_stream_rpc_method_handler,
}


Check = Callable[[Context], None]


def _late(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Hands a request that cannot be parsed to the handler's guard, as the error that it makes.

    gRPC would answer UNKNOWN by itself, and log a traceback for each.
    """

    def parse(body: bytes) -> Any:
        try:
            return deserialize(body)
        except DecodeError as error:
            return error

    return parse


def _caller_check(service: str, allowed: frozenset[str] | None) -> Check:
    """Raises PermissionDenied for a caller whose certificate is of none of the roles allowed."""

    def check(context: Context) -> None:
        if allowed is None:
            return
        role = role_of(context.auth_context())
        if role not in allowed:
            names = ", ".join(sorted(allowed))
            raise PermissionDenied(
                f"{service} is for role {names}; the caller's certificate is of "
                f"{f'role {role}' if role else 'no role'}"
            )

    return check


def _parsed(request: Any) -> Any:
    if isinstance(request, DecodeError):
        raise request
    return request


def _guard(call: Callable[..., Any], check: Check) -> Callable[..., Any]:
    guard = _guard_stream if inspect.isasyncgenfunction(call) else _guard_call
    return guard(call, check)


def _guard_call(call: Callable[..., Awaitable[Any]], check: Check) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: Context) -> Any:
        try:
            check(context)
            return await call(_parsed(request), context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await abort(context, error)

    return guarded


def _guard_stream(call: Callable[..., Any], check: Check) -> Callable[..., AsyncIterator[Any]]:
    async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            check(context)
            async with contextlib.aclosing(call(_parsed(request), context)) as responses:
                async for response in responses:
                    yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await abort(context, error)

    return guarded
