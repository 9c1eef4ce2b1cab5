"""Messages as they come from a peer, before anything is believed of them."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

from google.protobuf.message import DecodeError

from treecast.errors import InvalidFrame


async def readable(messages: AsyncIterable[Any]) -> AsyncIterator[Any]:
    """The messages of one stream.

    Raises:
        InvalidFrame: one cannot be parsed. gRPC raises an error of protobuf's for that in a server,
            and hands a client None.
    """
    try:
        async for message in messages:
            if message is None:
                raise InvalidFrame("a message cannot be parsed")
            yield message
    except DecodeError:
        raise InvalidFrame("a message cannot be parsed") from None
