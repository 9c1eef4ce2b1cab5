"""A TCP proxy on loopback that can slow a link down or cut it, one way or both."""

from __future__ import annotations

import asyncio
from typing import Self

_CHUNK_BYTES = 64 * 1024
_QUEUED_CHUNKS = 256


class Way:
    """One direction. A cut holds bytes back as a network does, until it is healed.

    Attributes:
        num_bytes: passed on so far.
    """

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.num_bytes = 0
        self._whole = asyncio.Event()
        self._whole.set()

    def cut(self) -> None:
        self._whole.clear()

    def heal(self) -> None:
        self.delay_s = 0.0
        self._whole.set()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass everything on, each chunk late by the delay, until either end closes."""
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUED_CHUNKS)
        reading = asyncio.create_task(self._read(reader, chunks))
        try:
            await self._write(writer, chunks)
        except ConnectionError:
            pass
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(
        self, reader: asyncio.StreamReader, chunks: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        loop, data = asyncio.get_running_loop(), b"-"
        while data:
            try:
                data = await reader.read(_CHUNK_BYTES)
            except ConnectionError:
                data = b""
            await chunks.put((loop.time() + self.delay_s, data))

    async def _write(
        self, writer: asyncio.StreamWriter, chunks: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s, data = await chunks.get()
            if (wait_s := due_s - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            await self._whole.wait()
            if not data:
                return
            writer.write(data)
            self.num_bytes += len(data)
            await writer.drain()


class LinkProxy:
    """Stands before one server; an async context manager.

    Attributes:
        there, back: from callers to the server, and from it to them.
    """

    def __init__(self, port: int, target_port: int) -> None:
        self.there, self.back = Way(), Way()
        self._port = port
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def ways(self) -> tuple[Way, Way]:
        return self.there, self.back

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Both directions of one connection; either end closing ends both."""
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.close()
            return
        pumps = (
            asyncio.create_task(self.there.pump(reader, far_writer)),
            asyncio.create_task(self.back.pump(far_reader, writer)),
        )
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            writer.close()
            far_writer.close()
