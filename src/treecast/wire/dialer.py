"""The calling end of a pair stream: dialed again and again until closed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, TypeVar

import grpc
import structlog

from treecast.errors import (
    Cancelled,
    DuplicateRequest,
    PeerMismatch,
    TreecastError,
    Unavailable,
)
from treecast.wire.channel import is_cancelled, open_channel
from treecast.wire.frames import Heartbeat, Hello
from treecast.wire.greeting import receive_greeting
from treecast.wire.hop import Hop
from treecast.wire.incoming import readable
from treecast.wire.link import Link, PairHandler
from treecast.wire.status import from_rpc_error
from treecast.wire.tls import Tls, server_name

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 2.0
SLOW_RETRY_S = 10.0
"""Pause after a refusal that trying again soon cannot change."""

_STABLE_S = 5.0
_WRONG_NAME = "Hostname Verification Check failed"
"""gRPC's words for it; with others the refusal stands, and says less."""

_SLOW = (PeerMismatch, DuplicateRequest)

Out = TypeVar("Out")
In = TypeVar("In")

log = structlog.get_logger()


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
        tls: Tls | None = None,
    ) -> None:
        self.address = address
        self._hop = hop
        self._hello = hello
        self._heartbeat = heartbeat
        self._handler = handler
        self._tls = tls
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
        role = self._hop.serving.role.name.lower()
        channel = open_channel(self.address, tls=self._tls, peer_role=role)
        try:
            return await self._hold(channel)
        except grpc.RpcError as error:
            return self._explain(from_rpc_error(error), role)
        except TreecastError as error:
            return error
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            return Cancelled("call was cancelled")
        except Exception as error:
            log.error("dialing failed", address=self.address, exc_info=error)
            return TreecastError("internal error")
        finally:
            self._link = None
            await channel.close()

    def _explain(self, error: TreecastError, role: str) -> TreecastError:
        """Say what gRPC leaves out: which name the certificate should have had."""
        if _WRONG_NAME not in error.message:
            return error
        return PeerMismatch(
            f"certificate of {self.address} is no {role}'s; expected {server_name(role)}"
        )

    async def _hold(self, channel: grpc.aio.Channel) -> TreecastError:
        ours = self._hello()
        opened: asyncio.Future[Link[Out, In]] = asyncio.get_running_loop().create_future()
        greeting = self._hop.dialing.encode([ours, self._heartbeat()])
        call = self._hop.call(channel)(self._requests(greeting, opened))
        messages = readable(call)
        try:
            end = self._hop.dialing
            answer = await receive_greeting(end, messages, ours)
            link = Link(end, self.address, ours, answer, self._heartbeat, self._handler)
            opened.set_result(link)
            self._link = link
            await link.run(messages)
        finally:
            call.cancel()
        return link.error or Unavailable(link.why_closed)

    async def _requests(
        self, greeting: Any, opened: asyncio.Future[Link[Out, In]]
    ) -> AsyncIterator[Any]:
        yield greeting
        link = await asyncio.shield(opened)
        async for message in link.outgoing():
            yield message


def retry_pause_s(failures: int, problem: TreecastError | None) -> float:
    """Jittered pause before dialing again, after `failures` short-lived attempts in a row."""
    if isinstance(problem, _SLOW):
        return SLOW_RETRY_S * random.uniform(0.75, 1.25)
    longest = min(LAST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(failures, 10))
    return longest * random.uniform(0.5, 1.0)
