"""An answer on its way to the client: as one JSON object, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from treecast.services.router.text import ModelText
from treecast.v1 import router_pb2 as pb

from .choices import Choice, Form, Json
from .errors import error_body, error_response

TextOf = Callable[[str, str], ModelText]
"""The tokenizer of a model and its revision."""

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies that would wait for more
]


class Reply(Protocol):
    """Takes events; `end` or `fail` once, at the end."""

    async def write(self, event: pb.GenerateResponse) -> None: ...
    async def end(self) -> None: ...
    async def fail(self, error: Exception) -> None: ...


class Envelope:
    """What all objects of one answer share, known from the first event on; and the usage."""

    def __init__(self, form: Form, text_of: TextOf) -> None:
        self._form = form
        self._text_of = text_of
        self._created = int(time.time())
        self._started: pb.Started | None = None
        self._finished: list[pb.Finished] = []

    def take(self, event: pb.GenerateResponse) -> None:
        match event.WhichOneof("event"):
            case "started" if self._started is None:
                self._started = event.started
            case "finished":
                self._finished.append(event.finished)

    @property
    def text(self) -> ModelText:
        assert self._started is not None
        return self._text_of(self._started.model, self._started.model_revision)

    def wrap(self, kind: str, choices: Sequence[Json], **more: Any) -> Json:
        """An object; what computed it is its fingerprint."""
        assert self._started is not None
        return {
            "id": self._form.prefix + self._started.request_id,
            "object": kind,
            "created": self._created,
            "model": self._started.adapter or self._started.model,
            "system_fingerprint": self._started.numerics_fingerprint,
            "choices": list(choices),
            **more,
        }

    def usage(self) -> Json:
        """The prompt counts once, however many samples it had."""
        usages = [one.usage for one in self._finished]
        output = sum(usage.output_tokens for usage in usages)
        prompt = usages[0].prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": usages[0].cached_tokens},
        }


class WholeReply:
    """One JSON object at the end."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, form: Form, envelope: Envelope
    ) -> None:
        self._asgi = scope, receive, send
        self._form = form
        self._envelope = envelope
        self._choices: dict[int, Choice] = {}

    async def write(self, event: pb.GenerateResponse) -> None:
        index = event.sample_index
        self._envelope.take(event)
        self._choices.setdefault(index, Choice(index)).take(event)

    async def end(self) -> None:
        # On a thread: thousands of tokens with their log-probabilities take part of a second.
        response = await asyncio.to_thread(self._response)
        await response(*self._asgi)

    def _response(self) -> JSONResponse:
        text = self._envelope.text
        choices = [self._form.choice(self._choices[at], text) for at in sorted(self._choices)]
        body = self._envelope.wrap(self._form.whole, choices, usage=self._envelope.usage())
        return JSONResponse(body)

    async def fail(self, error: Exception) -> None:
        await error_response(error)(*self._asgi)


class StreamedReply:
    """Server-sent events. An error before the first is a plain HTTP answer."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        form: Form,
        envelope: Envelope,
        include_usage: bool,
    ) -> None:
        self._asgi = scope, receive, send
        self._send = send
        self._form = form
        self._envelope = envelope
        self._usage: Json = {"usage": None} if include_usage else {}
        self._offsets: dict[int, int] = {}
        self._begun = False

    async def write(self, event: pb.GenerateResponse) -> None:
        self._envelope.take(event)
        if not self._begun:
            self._begun = True
            await self._send(
                {"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS}
            )
        choice = self._piece(event)
        if choice is not None:
            await self._event(self._envelope.wrap(self._form.chunk, [choice], **self._usage))

    def _piece(self, event: pb.GenerateResponse) -> Json | None:
        index = event.sample_index
        if event.WhichOneof("event") == "started":
            return self._form.opening(index)
        piece = Choice(index, offset=self._offsets.get(index, 0))
        piece.take(event)
        text = self._envelope.text
        if piece.logprobs:
            self._offsets[index] = piece.offset + sum(
                len(text.token(one).text) for one in piece.ids
            )
        return self._form.piece(piece, text)

    async def end(self) -> None:
        if self._usage:
            usage = self._envelope.usage()
            await self._event(self._envelope.wrap(self._form.chunk, [], usage=usage))
        await self._line("[DONE]", more=False)

    async def fail(self, error: Exception) -> None:
        if self._begun:
            await self._line(_dump(error_body(error)), more=False)
        else:
            await error_response(error)(*self._asgi)

    async def _event(self, body: Json) -> None:
        await self._line(_dump(body), more=True)

    async def _line(self, data: str, more: bool) -> None:
        body = f"data: {data}\n\n".encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


def _dump(body: Json) -> str:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))
