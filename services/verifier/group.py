"""A verifier group on this host: its ranks start, fail and restart as one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import Mapping
from pathlib import Path

import structlog

from treecast import lifeline
from treecast.errors import EngineLost
from treecast.model_folder import check_model_dir
from treecast.settings import as_environment
from treecast.wire.frames import Role
from treecast.wire.lifecycle import begin, stop_signal

from .loading import check_adapters, model_folder
from .settings import VerifierSettings

_LOOPBACK = "lo"

log = structlog.get_logger()


async def run_group(settings: VerifierSettings) -> None:
    """Keep a group running until a signal: one that has served and breaks is formed again.

    The ranks alone load torch: a group that comes back must not wait for us to do so, nor its host
    hold it once more.

    Raises:
        ModelError: the model is not there.
        EngineLost: the group broke before it served; the ranks' own messages say why.
    """
    begin(settings, Role.VERIFIER)
    check_adapters(settings)
    folder = model_folder(settings)
    check_model_dir(folder)
    settings = settings.model_copy(update={"model": str(folder)})
    stopped = stop_signal()
    while True:
        group = RankGroup(settings)
        lost = await group.run(stopped)
        if not lost:
            return
        if not group.announcement:
            raise EngineLost(f"the group broke before it served: {lost}")
        log.error("group.lost", reason=lost)
        settings = settings.model_copy(update=_same_addresses(settings, group.announcement))


class RankGroup:
    """One life of a group.

    Attributes:
        announcement: what rank 0 printed when it was ready; empty until then.
    """

    def __init__(self, settings: VerifierSettings) -> None:
        self.announcement: dict[str, str] = {}
        self._settings = settings
        self._ranks: list[Process] = []

    async def run(self, stopped: asyncio.Event) -> str:
        """Start the ranks and wait until they have ended.

        Returns:
            Who ended and how, if it was not because we were told to stop; else nothing.
        """
        with tempfile.TemporaryDirectory(prefix="treecast-group-") as folder:
            try:
                for rank in range(self._settings.group.size):
                    self._ranks.append(await self._start(rank, Path(folder)))
                return await self._watch(stopped)
            finally:
                await self._kill()

    async def _watch(self, stopped: asyncio.Event) -> str:
        ends = [asyncio.create_task(rank.wait()) for rank in self._ranks]
        reading = asyncio.create_task(self._read_announcement())
        stopping = asyncio.create_task(stopped.wait())
        await asyncio.wait([*ends, stopping], return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            return await self._stop(ends)
        stopping.cancel()
        lost = next(rank for rank, end in enumerate(ends) if end.done())
        await self._kill()
        await asyncio.gather(reading, *ends)
        return f"rank {lost} of {len(ends)} {_how(ends[lost].result())}"

    async def _stop(self, ends: list[asyncio.Task[int]]) -> str:
        """Rank 0 drains and tells the others to stop; whoever then fails needs no mourning."""
        if self._ranks[0].returncode is None:
            self._ranks[0].send_signal(signal.SIGTERM)
        await ends[0]
        await asyncio.wait(ends, timeout=self._settings.rank_timeout_s)
        return ""

    async def _start(self, rank: int, folder: Path) -> Process:
        launcher = [sys.executable, "-I", "-S", lifeline.__file__, str(os.getpid())]
        return await asyncio.create_subprocess_exec(
            *launcher,
            *(sys.executable, "-m", "treecast.services.verifier"),
            env=os.environ | self._environment(rank, folder),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if rank == 0 else None,
            start_new_session=True,  # Ctrl-C is for us
        )

    def _environment(self, rank: int, folder: Path) -> Mapping[str, str]:
        """A meeting place that only this user can reach, and sockets that only this host can."""
        settings = self._settings.model_copy(
            update={"rendezvous": f"file://{folder}/store", "announce": True}
        )
        size = str(settings.group.size)
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        world = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GLOO_SOCKET_IFNAME": _LOOPBACK}
        return as_environment(settings) | place | world

    async def _read_announcement(self) -> None:
        """Rank 0's line becomes ours: whoever started the group knows it by our pid."""
        stdout = self._ranks[0].stdout
        assert stdout is not None
        async for line in stdout:
            if self.announcement or not line.startswith(b"{"):
                continue
            self.announcement = json.loads(line)
            if self._settings.announce:
                own = self.announcement | {"pid": os.getpid()}
                print(json.dumps(own), flush=True)  # noqa: T201

    async def _kill(self) -> None:
        """End whoever still runs: nothing that a rank holds outlives its group."""
        for rank in self._ranks:
            if rank.returncode is None:
                rank.kill()
            await rank.wait()


def _same_addresses(
    settings: VerifierSettings, announcement: Mapping[str, str]
) -> dict[str, str | None]:
    """Where the group was, it is to be found again."""
    return {
        "listen": announcement["address"] if settings.advertise is None else settings.listen,
        "metrics_listen": announcement["metrics"] or settings.metrics_listen,
    }


def _how(code: int) -> str:
    return (
        f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
    )
