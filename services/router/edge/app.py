"""The HTTP routes. They translate; `RouterService.generate` serves."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from treecast.errors import NotServed, TreecastError
from treecast.services.router.service import Call, RouterService
from treecast.telemetry.traces import valid_traceparent

from .body import read_body
from .choices import ChatForm, CompletionForm, Form, Json
from .errors import error_response, plain_error
from .listener import HttpListener
from .replies import Envelope, Reply, StreamedReply, WholeReply
from .schema import Asked, ChatAsked, CompletionAsked, parse

log = structlog.get_logger()


def http_edge(
    service: RouterService, listen: str, tls: ssl.SSLContext | None = None
) -> HttpListener:
    """The edge of one router, over TLS if a context is given; binds nothing yet.

    Raises:
        SettingsError: the address is malformed.
    """
    return HttpListener(make_app(service), listen, tls)


def make_app(service: RouterService) -> Starlette:
    models = Models(service)
    routes = [
        Route("/healthz", _health),
        Route("/v1/models", models.list),
        Route("/v1/models/{name:path}", models.get),
        Route("/v1/chat/completions", Generating(service, ChatAsked, ChatForm()), methods=["POST"]),
        Route(
            "/v1/completions",
            Generating(service, CompletionAsked, CompletionForm()),
            methods=["POST"],
        ),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _refuse})


async def _health(request: Request) -> Response:
    """The process lives. Whether it should get requests, `grpc.health.v1` says."""
    return PlainTextResponse("ok")


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return plain_error(error.status_code, f"{request.method} {request.url.path}: {error.detail}")


class Models:
    """`GET /v1/models`: one entry for each name, whichever revisions serve it.

    An adapter is a model of its own, as with vLLM: its name is what clients send as the model.
    """

    def __init__(self, service: RouterService) -> None:
        self._service = service
        self._created = int(time.time())

    async def list(self, request: Request) -> Response:
        try:
            entries = self._entries(request)
        except TreecastError as error:
            return error_response(error)
        return JSONResponse({"object": "list", "data": [*entries.values()]})

    async def get(self, request: Request) -> Response:
        name = request.path_params["name"]
        try:
            entries = self._entries(request)
            if name not in entries:
                served = ", ".join(sorted(entries))
                raise NotServed(f"model {name!r} is not served; served: {served}")
        except TreecastError as error:
            return error_response(error)
        return JSONResponse(entries[name])

    def _entries(self, request: Request) -> dict[str, Json]:
        entries: dict[str, Json] = {}
        for model in self._service.models(_authorization(request)):
            entries[model.name] = self._entry(model.name, model.context_tokens)
            for one in model.adapters:
                entry = self._entry(one.name, model.context_tokens) | {"parent": model.name}
                entries.setdefault(one.name, entry)
        return entries

    def _entry(self, name: str, context_tokens: int) -> Json:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "treecast",
            "max_model_len": context_tokens,
        }


class Generating:
    """An endpoint that generates; an ASGI app, since it watches for the client's leaving."""

    def __init__(self, service: RouterService, kind: type[Asked], form: Form) -> None:
        self._service = service
        self._kind = kind
        self._form = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; one whose client leaves is cancelled wherever it is."""
        request = Request(scope, receive)
        try:
            self._service.check_key(_authorization(request))
            asked = await asyncio.to_thread(parse, self._kind, await read_body(request))
            wanted = asked.to_request()
        except ClientDisconnect:
            return
        except TreecastError as error:
            await error_response(error)(scope, receive, send)
            return
        reply = self._reply(asked, scope, receive, send)
        call = Call(
            reply.write,
            traceparent=valid_traceparent(request.headers.get("traceparent")),
            authorization=_authorization(request),
        )
        try:
            await _while_there(receive, self._service.generate(wanted, call))
            await reply.end()
        except ClientDisconnect:
            return
        except Exception as error:
            if not isinstance(error, TreecastError):
                log.error("unexpected error in a call", exc_info=error)
            await reply.fail(error)

    def _reply(self, asked: Asked, scope: Scope, receive: Receive, send: Send) -> Reply:
        envelope = Envelope(self._form, self._service.text_of)
        if asked.stream:
            include_usage = asked.include_usage
            return StreamedReply(scope, receive, send, self._form, envelope, include_usage)
        return WholeReply(scope, receive, send, self._form, envelope)


def _authorization(request: Request) -> str | None:
    return request.headers.get("authorization")


async def _while_there(receive: Receive, work: Awaitable[None]) -> None:
    """Wait for `work`, and cancel it when the client leaves.

    Raises:
        ClientDisconnect: it left.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
