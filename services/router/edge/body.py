"""Reading a request's body: bounded in bytes and time before anything is made of it."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from treecast.errors import InvalidRequest
from treecast.wire.channel import MAX_MESSAGE_BYTES

from .errors import BodyTooLarge, BodyTooSlow

READ_TIMEOUT_S = 30.0


async def read_body(request: Request) -> bytes:
    """All of it, no larger than what gRPC takes either.

    Raises:
        BodyTooLarge, BodyTooSlow: as they say.
        InvalidRequest: it is not JSON by its headers.
        ClientDisconnect: the client left meanwhile.
    """
    _check_headers(request)
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            return await _read(request)
    except TimeoutError:
        raise BodyTooSlow(f"body did not arrive within {READ_TIMEOUT_S:g} s") from None


def _check_headers(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise InvalidRequest(f"content-type is {kind[:80]!r}; it must be application/json")
    _check_size(int(request.headers.get("content-length") or 0))  # the server has parsed it


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        _check_size(len(body) + len(chunk))
        body += chunk
    return bytes(body)


def _check_size(num_bytes: int) -> None:
    if num_bytes > MAX_MESSAGE_BYTES:
        raise BodyTooLarge(f"body has {num_bytes} bytes or more; the limit is {MAX_MESSAGE_BYTES}")
