"""Long-lived bidirectional streams: one per pair of processes, carrying all their sessions.

`Dialer` keeps the calling end up for ever, `Acceptor` serves the other; both hand `Link`s to a
`PairHandler`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any, Generic, TypeVar

import grpc
import structlog

from treecast.errors import DuplicateRequest, PeerMismatch, TreecastError, Unavailable
from treecast.wire.channel import open_channel
from treecast.wire.frames import BadFrame, Heartbeat, Hello
from treecast.wire.greeting import Greeting, check_peer, is_hung, receive_greeting
from treecast.wire.hop import SERVE, SPECULATE, End, Hop
from treecast.wire.link import HEARTBEAT_S, SILENCE_S, Link, PairHandler
from treecast.wire.outbox import Outbox
from treecast.wire.status import abort, from_rpc_error

__all__ = [
    "HEARTBEAT_S",
    "SERVE",
    "SILENCE_S",
    "SPECULATE",
    "Acceptor",
    "BadFrame",
    "Dialer",
    "End",
    "Greeting",
    "Hop",
    "Link",
    "Outbox",
    "PairHandler",
    "accept_any",
    "check_peer",
    "is_hung",
]

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 2.0
SLOW_RETRY_S = 10.0
"""Pause after a refusal that trying again soon cannot change."""

_STABLE_S = 5.0
_WRITE_GRACE_S = 1.0
_SLOW = (PeerMismatch, DuplicateRequest)

Out = TypeVar("Out")
In = TypeVar("In")

log = structlog.get_logger()


def accept_any(peer: Hello) -> None:
    """The check of a service that asks no more of its peers than `check_peer` does."""


class Dialer(Generic[Out, In]):
    """Keeps one stream to an address up until closed, whatever happens to the peer."""

    def __init__(
        self,
        address: str,
        hop: Hop[Out, In],
        hello: Callable[[], Hello],
        heartbeat: Callable[[], Heartbeat],
        handler: PairHandler[Out, In],
        *,
        channel_credentials: grpc.ChannelCredentials | None = None,
        check: Callable[[Hello], None] = accept_any,
    ) -> None:
        self.address = address
        self._hop = hop
        self._hello = hello
        self._heartbeat = heartbeat
        self._handler = handler
        self._credentials = channel_credentials
        self._check = check
        self._link: Link[Out, In] | None = None
        self._problem: TreecastError | None = None
        self._keeping: asyncio.Task[None] | None = None

    @property
    def link(self) -> Link[Out, In] | None:
        """The open stream, if there is one now."""
        return self._link if self._link is not None and self._link.alive else None

    @property
    def problem(self) -> TreecastError | None:
        """Why the last attempt or stream ended; None while a stream is open or none was tried."""
        return None if self.link else self._problem

    def start(self) -> None:
        """Begin dialing on the running event loop. Once."""
        self._keeping = asyncio.create_task(self._keep(), name=f"dial {self.address}")

    async def close(self) -> None:
        """Close the stream and stop dialing. Safe to repeat."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            began = loop.time()
            self._note(await self._connect())
            failures = 0 if loop.time() - began > _STABLE_S else failures + 1
            await asyncio.sleep(retry_pause_s(failures, self._problem))

    def _note(self, problem: TreecastError) -> None:
        if str(problem) != str(self._problem):
            log.warning("no stream", address=self.address, why=problem.message)
        self._problem = problem

    async def _connect(self) -> TreecastError:
        """Hold one stream from hello to end; returns why it ended."""
        channel = open_channel(self.address, credentials=self._credentials)
        try:
            return await self._hold(channel)
        except grpc.RpcError as error:
            return from_rpc_error(error)
        except TreecastError as error:
            return error
        except Exception as error:
            log.error("dialing failed", address=self.address, exc_info=error)
            return TreecastError("internal error")
        finally:
            await channel.close()

    async def _hold(self, channel: grpc.aio.Channel) -> TreecastError:
        ours = self._hello()
        opened: asyncio.Future[Link[Out, In]] = asyncio.get_running_loop().create_future()
        call = self._hop.call(channel)(self._requests(ours, opened))
        messages = aiter(call)
        try:
            end = self._hop.dialing
            greeting = await receive_greeting(end, messages, ours, self._check)
            link = Link(end, self.address, ours, greeting, self._heartbeat, self._handler)
            opened.set_result(link)
            self._link = link
            await link.run(messages)
        finally:
            call.cancel()
        return link.error or Unavailable(link.why_closed)

    async def _requests(
        self, ours: Hello, opened: asyncio.Future[Link[Out, In]]
    ) -> AsyncIterator[Any]:
        yield self._hop.dialing.encode([ours, self._heartbeat()])
        link = await asyncio.shield(opened)
        async for message in link.outgoing():
            yield message


def retry_pause_s(failures: int, problem: TreecastError | None) -> float:
    """Jittered pause before dialing again, after `failures` short-lived attempts in a row."""
    if isinstance(problem, _SLOW):
        return SLOW_RETRY_S * random.uniform(0.75, 1.25)
    longest = min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(failures, 10))
    return longest * random.uniform(0.5, 1.0)


class Acceptor(Generic[Out, In]):
    """The serving end of a hop: one per service, since it knows all its streams."""

    def __init__(
        self,
        hop: Hop[In, Out],
        hello: Callable[[], Hello],
        heartbeat: Callable[[], Heartbeat],
        handler: PairHandler[Out, In],
        check: Callable[[Hello], None] = accept_any,
    ) -> None:
        self._end = hop.serving
        self._hello = hello
        self._heartbeat = heartbeat
        self._handler = handler
        self._check = check
        self._links: dict[str, Link[Out, In]] = {}

    @property
    def links(self) -> list[Link[Out, In]]:
        """Open streams."""
        return list(self._links.values())

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

        A newer stream of the same instance replaces the older, whose `closed` comes first.
        """
        messages = aiter(request_iterator)
        ours = self._hello()
        try:
            greeting = await receive_greeting(self._end, messages, ours, self._check)
        except TreecastError as error:
            await abort(context, error)
        link = Link(self._end, context.peer(), ours, greeting, self._heartbeat, self._handler)
        # The stub asks for a class of its own where any callable will do.
        context.add_done_callback(lambda _: link.close("the call ended"))  # type: ignore[arg-type]
        running = asyncio.create_task(self._run(link, messages, asyncio.current_task()))
        try:
            yield self._end.encode([ours, self._heartbeat()])
            async for message in link.outgoing():
                yield message
        finally:
            link.close("the call ended")
            running.cancel()
        if link.error is not None:
            await abort(context, link.error)

    async def _run(
        self,
        link: Link[Out, In],
        messages: AsyncIterator[Any],
        call: asyncio.Task[Any] | None,
    ) -> None:
        self._replace(link)
        try:
            await link.run(messages)
        finally:
            if self._links.get(link.peer.instance_id) is link:
                del self._links[link.peer.instance_id]
        # A write that waits for a peer which does not read cannot see that the link is over.
        await asyncio.sleep(_WRITE_GRACE_S)
        if call is not None:
            call.cancel()

    def _replace(self, link: Link[Out, In]) -> None:
        instance = link.peer.instance_id
        if instance in self._links:
            why = f"stream of instance {instance!r} was replaced by a newer one"
            self._links[instance].close(why, DuplicateRequest(why))
        self._links[instance] = link
