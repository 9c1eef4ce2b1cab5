"""Streams to every process of a role: the dialing side of a registry."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from treecast.errors import DuplicateRequest
from treecast.wire.dialer import Dialer
from treecast.wire.frames import BadFrame, Heartbeat, Hello
from treecast.wire.hop import Hop
from treecast.wire.link import Link, PairHandler
from treecast.wire.registry import Entry
from treecast.wire.tls import Tls

Out = TypeVar("Out")
In = TypeVar("In")


class Streams(Generic[Out, In]):
    """One dialer per address that `follow` was told of; events go through to the handler.

    An entry that vanishes does not end a stream that lives, since the registry says where to dial,
    never who is healthy: its dialer goes once the stream is down.

    A process keeps one stream per peer. So two addresses of one process would take its stream from
    each other for ever: the address that lost it waits until that process is gone.
    """

    def __init__(
        self,
        hop: Hop[Out, In],
        hello: Callable[[], Hello],
        heartbeat: Callable[[], Heartbeat],
        handler: PairHandler[Out, In],
        tls: Tls | None = None,
    ) -> None:
        self._tls = tls
        self._hop = hop
        self._hello = hello
        self._heartbeat = heartbeat
        self._handler = handler
        self._dialers: dict[str, Dialer[Out, In]] = {}
        self._listed: frozenset[str] = frozenset()
        self._aliases: dict[str, str] = {}  # address -> instance that is known by another one
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def dialers(self) -> list[Dialer[Out, In]]:
        """In order of address."""
        return [self._dialers[address] for address in sorted(self._dialers)]

    async def close(self) -> None:
        """Close all streams. Safe to repeat."""
        for address in list(self._dialers):
            self._drop(address)
        await asyncio.gather(*self._closing)

    def follow(self, entries: tuple[Entry, ...]) -> None:
        """Dial new addresses; give up those that are neither listed any more nor answer."""
        self._listed = frozenset(entry.address for entry in entries)
        for address in self._listed - self._dialers.keys() - self._aliases.keys():
            self._dial(address)
        for address, dialer in list(self._dialers.items()):
            if dialer.link is None and address not in self._listed:
                self._drop(address)

    def _dial(self, address: str) -> None:
        self._dialers[address] = dialer = Dialer(
            address, self._hop, self._hello, self._heartbeat, self, tls=self._tls
        )
        dialer.start()

    def _drop(self, address: str) -> None:
        task = asyncio.create_task(self._dialers.pop(address).close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # --- PairHandler ----------------------------------------------------------------------------

    def opened(self, link: Link[Out, In]) -> None:
        self._handler.opened(link)

    def received(self, link: Link[Out, In], frame: In) -> None:
        self._handler.received(link, frame)

    def failed_frame(self, link: Link[Out, In], error: BadFrame) -> None:
        self._handler.failed_frame(link, error)

    def beat(self, link: Link[Out, In], heartbeat: Heartbeat) -> None:
        self._handler.beat(link, heartbeat)

    def closed(self, link: Link[Out, In]) -> None:
        self._redial(link)
        self._handler.closed(link)

    def _redial(self, link: Link[Out, In]) -> None:
        """Leave that to the dialer, unless the address is not wanted any more."""
        if link.address not in self._dialers:
            return
        if isinstance(link.error, DuplicateRequest):
            self._aliases[link.address] = link.peer.instance_id
            self._drop(link.address)
            return
        if link.address not in self._listed:
            self._drop(link.address)
        self._free_aliases(link.peer.instance_id)

    def _free_aliases(self, instance_id: str) -> None:
        freed = {address for address, of in self._aliases.items() if of == instance_id}
        for address in freed:
            del self._aliases[address]
        for address in freed & self._listed:
            self._dial(address)
