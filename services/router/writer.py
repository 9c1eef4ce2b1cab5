"""The client's end of a request: what is written there, and how much."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from treecast.v1 import router_pb2 as pb

Write = Callable[[pb.GenerateResponse], Awaitable[None]]
"""Takes an event, and waits while the client is slow."""


class Writer:
    """A request's stream, which its samples share and which takes one message at a time.

    Attributes:
        num_tokens: output tokens that went to the client.
    """

    def __init__(self, write: Write) -> None:
        self.num_tokens = 0
        self._write = write
        self._turn = asyncio.Lock()

    async def write(self, response: pb.GenerateResponse) -> None:
        self.num_tokens += len(response.delta.token_ids)
        async with self._turn:
            await self._write(response)
