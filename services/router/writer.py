"""The client's end of a request: what is written there, and how much."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from treecast.v1 import router_pb2 as pb


class Writer:
    """A request's stream, which its samples share and which takes one message at a time.

    Attributes:
        num_tokens: output tokens that went to the client.
    """

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self.num_tokens = 0
        self._context = context
        self._turn = asyncio.Lock()

    async def write(self, response: pb.GenerateResponse) -> None:
        self.num_tokens += len(response.delta.token_ids)
        async with self._turn:
            await self._context.write(response)
