"""The serving end of a pair stream, used inside a servicer's method."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any, Generic, TypeVar

import grpc

from treecast.errors import DuplicateRequest, TreecastError
from treecast.wire.frames import Heartbeat, Hello
from treecast.wire.greeting import receive_greeting
from treecast.wire.hop import Hop
from treecast.wire.incoming import readable
from treecast.wire.link import Link, PairHandler
from treecast.wire.status import abort

Out = TypeVar("Out")
In = TypeVar("In")


class Acceptor(Generic[Out, In]):
    """The serving end of a hop: one per service, since it knows all its streams."""

    def __init__(
        self,
        hop: Hop[In, Out],
        hello: Callable[[], Hello],
        heartbeat: Callable[[], Heartbeat],
        handler: PairHandler[Out, In],
    ) -> None:
        self._end = hop.serving
        self._hello = hello
        self._heartbeat = heartbeat
        self._handler = handler
        self._links: dict[str, Link[Out, In]] = {}

    @property
    def links(self) -> list[Link[Out, In]]:
        """Open streams."""
        return [link for link in self._links.values() if link.alive]

    async def sent(self) -> None:
        """Wait until all that was queued on all streams has been written."""
        await asyncio.gather(*(link.sent() for link in self.links))

    def close(self, reason: str) -> None:
        """Close all streams; their peers dial again."""
        for link in self.links:
            link.close(reason)

    async def accept(
        self,
        request_iterator: AsyncIterable[Any],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[Any]:
        """Serve one stream; a servicer's method yields what this yields.

        A newer stream of the same instance replaces the older, whose `closed` comes first. If the
        peer does not read, the call itself (not the link) lasts until the peer or its connection
        goes, or the server stops: gRPC has no way to end it from here.
        """
        messages = readable(request_iterator)
        ours = self._hello()
        try:
            greeting = await receive_greeting(self._end, messages, ours)
        except TreecastError as error:
            await abort(context, error)
        link = Link(self._end, context.peer(), ours, greeting, self._heartbeat, self._handler)
        # The stub asks for a class of its own where any callable will do.
        context.add_done_callback(lambda _: link.close("the call ended"))  # type: ignore[arg-type]
        running = asyncio.create_task(self._run(link, messages))
        try:
            yield self._end.encode([ours, self._heartbeat()])
            async for message in link.outgoing():
                yield message
        finally:
            link.close("the call ended")
            running.cancel()
        if link.error is not None:
            await abort(context, link.error)

    async def _run(self, link: Link[Out, In], messages: AsyncIterator[Any]) -> None:
        self._replace(link)
        try:
            await link.run(messages)
        finally:
            if self._links.get(link.peer.instance_id) is link:
                del self._links[link.peer.instance_id]

    def _replace(self, link: Link[Out, In]) -> None:
        instance = link.peer.instance_id
        if instance in self._links:
            why = f"stream of instance {instance!r} was replaced by a newer one"
            self._links[instance].close(why, DuplicateRequest(why))
        self._links[instance] = link
