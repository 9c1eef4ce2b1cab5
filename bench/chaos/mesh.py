"""The mesh that is hurt: two of each role as processes, a proxy before each worker, a Valkey."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import redis.asyncio

from treecast.client import AsyncClient, RetryPolicy, Status
from treecast.errors import TreecastError
from treecast.services.local import MeshError, MeshSettings, ServiceProcess
from treecast.services.local.certificates import ROLES, Authority, trust
from treecast.services.local.process import Spawner, child_environment, service_command
from treecast.services.local.settings import (
    Flags,
    router_flags,
    speculator_flags,
    speculator_names,
    verifier_flags,
)
from treecast.services.local.valkey import start_valkey
from treecast.wire.tls import TlsFiles

from .ports import quiet_port
from .proxy import LinkProxy

READY_S = 120.0
WHOLE_S = 60.0
DRAIN_S = 5.0
SESSION_TTL_S = 3.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class ChaosSettings:
    """What is started.

    Attributes:
        strangers: whether verifiers and routers also dial an address where a fuzzer may answer.
    """

    mesh: MeshSettings
    log_dir: Path
    num_routers: int = 2
    toy_step_s: float = 0.01
    strangers: bool = False
    further_verifier_flags: Flags = field(default_factory=dict)
    further_router_flags: Flags = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Place:
    """A worker's own port, and its proxy's, by which others know it."""

    port: int
    known_port: int

    @property
    def known(self) -> str:
        return f"127.0.0.1:{self.known_port}"

    @property
    def flags(self) -> Flags:
        return {"listen": f"127.0.0.1:{self.port}", "advertise": self.known}


class ChaosMesh:
    """An async context manager. No process outlives ours.

    Attributes:
        processes: by name: "valkey", "ssm" and so on, "verifier-0", "router-0".
        links: the proxies, by the name of the process behind them.
        strangers: by role, where a fuzzer may pose as a worker.
        authority: whose certificates the mesh began with.
        certificates: by role, if the mesh speaks TLS; see `issue`.
    """

    def __init__(self, settings: ChaosSettings) -> None:
        self.settings = settings
        self.processes: dict[str, ServiceProcess] = {}
        self.links: dict[str, LinkProxy] = {}
        self.certificates: dict[str, TlsFiles] = {}
        self.authority = Authority.make()
        self.strangers = {role: f"127.0.0.1:{quiet_port()}" for role in ("verifier", "speculator")}
        self._spawner = Spawner()
        self._stack = AsyncExitStack()
        self._redis_url = ""

    @property
    def speculators(self) -> list[str]:
        return list(speculator_names(self.settings.mesh.speculators))

    @property
    def verifiers(self) -> list[str]:
        return sorted(name for name in self.processes if name.startswith("verifier-"))

    @property
    def routers(self) -> list[str]:
        return sorted(name for name in self.processes if name.startswith("router-"))

    @property
    def services(self) -> list[str]:
        return [name for name in self.processes if name != "valkey"]

    @property
    def router_addresses(self) -> list[str]:
        return [self.processes[name].address for name in self.routers]

    def client(
        self,
        routers: Sequence[str] = (),
        retry: RetryPolicy | None = None,
        timeout_s: float = 10.0,
    ) -> AsyncClient:
        """Of these routers, or of all."""
        tls = self.certificates.get("client")
        return AsyncClient(routers or self.router_addresses, retry, timeout_s, tls=tls)

    def issue(self, authority: Authority, trusted: Sequence[Authority]) -> None:
        """Give every role a new certificate, in the same files; nobody is told."""
        folder = self.settings.log_dir / "certificates"
        folder.mkdir(exist_ok=True)
        trust(folder, trusted)
        self.certificates = {role: authority.issue(folder, role, trusted=trusted) for role in ROLES}

    async def __aenter__(self) -> Self:
        if self.settings.mesh.tls:
            self.issue(self.authority, [self.authority])
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def _start(self) -> None:
        mesh, log = self.settings.mesh, self.settings.log_dir / "valkey.log"
        self.processes["valkey"], self._redis_url = await asyncio.to_thread(
            start_valkey, log, self._spawner
        )
        drafters = speculator_names(mesh.speculators)
        places = {name: await self._place(name) for name in drafters}
        await self._together(
            self._launch_speculator(name, drafters[name], place) for name, place in places.items()
        )
        speculators = [place.known for place in places.values()]
        places = {f"verifier-{n}": await self._place(f"verifier-{n}") for n in range(self._wanted)}
        await self._together(
            self._launch_verifier(name, place, speculators) for name, place in places.items()
        )
        verifiers = [place.known for place in places.values()]
        await self._together(
            self._launch_router(n, verifiers) for n in range(self.settings.num_routers)
        )
        await self.wait_whole()

    @property
    def _wanted(self) -> int:
        return self.settings.mesh.num_verifiers

    async def _together(self, launches: Iterable[Coroutine[Any, Any, None]]) -> None:
        """Real models one after the other, since each measures its step time when it starts."""
        if self.settings.mesh.engine == "toy":
            await asyncio.gather(*launches)
            return
        for launch in launches:
            await launch

    async def _launch_speculator(self, name: str, drafter: str, place: Place) -> None:
        flags = speculator_flags(self.settings.mesh, drafter)
        await self._launch(name, "speculator", {**flags, **place.flags, "drain_s": DRAIN_S})

    async def _launch_router(self, number: int, verifiers: Sequence[str]) -> None:
        flags = {
            **router_flags(self.settings.mesh, [*verifiers, *self._strangers("verifier")]),
            "listen": f"127.0.0.1:{quiet_port()}",
            "http_listen": f"127.0.0.1:{quiet_port()}",
            "drain_s": DRAIN_S,
            **self.settings.further_router_flags,
        }
        await self._launch(f"router-{number}", "router", flags)

    async def _launch_verifier(self, name: str, place: Place, speculators: Sequence[str]) -> None:
        settings = self.settings
        flags = {
            **verifier_flags(settings.mesh, [*speculators, *self._strangers("speculator")]),
            "trusted_speculators": None,
            **place.flags,
            "drain_s": DRAIN_S,
            "session_ttl_s": SESSION_TTL_S,
            "toy_step_s": settings.toy_step_s,
            **settings.further_verifier_flags,
        }
        await self._launch(name, "verifier", flags)

    def _strangers(self, role: str) -> list[str]:
        return [self.strangers[role]] if self.settings.strangers else []

    async def _place(self, name: str) -> Place:
        place = Place(quiet_port(), quiet_port())
        proxy = LinkProxy(place.known_port, place.port)
        self.links[name] = await self._stack.enter_async_context(proxy)
        return place

    async def _launch(self, name: str, role: str, flags: Flags) -> None:
        tls: Flags = {}
        if files := self.certificates.get(role):
            tls = {"tls_cert": files.cert, "tls_key": files.key, "tls_ca": files.ca}
        command = service_command(role, {"redis_url": self._redis_url, **tls, **flags})
        await self._spawn(name, command)
        await asyncio.to_thread(self.processes[name].wait_ready, READY_S)

    async def _spawn(self, name: str, command: Sequence[str]) -> None:
        log, environment = self.settings.log_dir / f"{name}.log", child_environment({})
        self.processes[name] = await asyncio.to_thread(
            ServiceProcess, name, command, environment, log, self._spawner
        )

    # --- what is done to it ---------------------------------------------------------------------

    async def kill(self, name: str) -> None:
        """`kill -9`."""
        await asyncio.to_thread(self.processes[name].kill)

    async def restart(self, name: str) -> None:
        """Start what has ended once more, at the same address, and wait until it is ready."""
        await self._spawn(name, self.processes[name].command)
        if name == "valkey":
            await self._redis_answers()
        else:
            await asyncio.to_thread(self.processes[name].wait_ready, READY_S)

    async def roll(self, name: str) -> None:
        """SIGTERM, wait until it has drained and ended, start it anew."""
        await asyncio.to_thread(self.processes[name].stop, 3 * DRAIN_S)
        await self.restart(name)

    def freeze(self, name: str) -> None:
        self.processes[name].signal(signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        self.processes[name].signal(signal.SIGCONT)

    async def _redis_answers(self) -> None:
        async with redis.asyncio.Redis.from_url(self._redis_url, socket_timeout=1.0) as client:
            while True:
                try:
                    await client.ping()
                    return
                except redis.ConnectionError:
                    await asyncio.sleep(_POLL_S)

    # --- what it is now -------------------------------------------------------------------------

    async def wait_whole(self) -> None:
        """Until every router sees every verifier with every speculator, and Redis.

        Raises:
            MeshError: it did not come to that in time.
        """
        deadline_s = time.monotonic() + WHOLE_S
        for address in self.router_addresses:
            async with self.client([address], RetryPolicy(1), timeout_s=2.0) as client:
                while missing := await self._missing(client):
                    if time.monotonic() > deadline_s:
                        raise MeshError(f"mesh is not whole after {WHOLE_S:g} s: {missing}")
                    await asyncio.sleep(_POLL_S)

    async def _missing(self, client: AsyncClient) -> str:
        try:
            status = await client.status()
        except TreecastError as error:
            return error.message
        return self._missing_in(status)

    def _missing_in(self, status: Status) -> str:
        healthy = [one for one in status.verifiers if one.healthy]
        if len(healthy) < self._wanted:
            return f"{len(healthy)} healthy verifiers"
        for one in healthy:
            if len(one.speculators) < len(self.settings.mesh.speculators):
                return f"verifier {one.address} has {len(one.speculators)} speculators"
        return "" if status.redis_ok else "no Redis"

    async def stop(self) -> None:
        """End everything at once. Safe to repeat."""
        for name in [*self.routers, *self.verifiers, *self.speculators, "valkey"]:
            if name in self.processes:
                self.thaw(name)
                await self.kill(name)
        await self._stack.aclose()
        await asyncio.to_thread(self._spawner.close)
