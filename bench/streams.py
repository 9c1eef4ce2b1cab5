"""How many streams one router bears: `python -m treecast.bench.streams --streams 2000`.

Toy verifiers with a slow step, so that all streams run at once; beside them one caller asks the
router's health again and again.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from treecast.checkpoints import default_cache_dir
from treecast.client import AsyncClient
from treecast.errors import TreecastError
from treecast.services.local import MeshSettings
from treecast.services.local.logs import new_log_dir

from .chaos.audit import rss_mib
from .chaos.load import Record, Work, follow, toy_works, undisturbed
from .chaos.mesh import ChaosMesh, ChaosSettings
from .chaos.table import percentile

_STREAMS_PER_CLIENT = 100
"""gRPC's own bound on one connection; further clients open further ones."""

_ASK_EVERY_S = 0.05


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run.

    Attributes:
        failed: what streams ended with instead of the right tokens, with how often.
        most: streams that ran at once, at most.
    """

    num_streams: int
    failed: Counter[str]
    most: int
    seconds: float
    health_ms: tuple[float, ...]
    pauses_s: tuple[float, ...]
    router_mib: float

    def __str__(self) -> str:
        health, pauses = self.health_ms, self.pauses_s
        return (
            f"{self.num_streams} streams through one router, {self.most} at once, in "
            f"{self.seconds:.1f} s; failed: {dict(self.failed) or 'none'}\n"
            f"health of {len(health)} asked: p50 {percentile(health, 50):.1f} ms, "
            f"p99 {percentile(health, 99):.1f} ms, longest {max(health):.1f} ms\n"
            f"longest pause of a stream: p50 {percentile(pauses, 50):.2f} s, "
            f"p99 {percentile(pauses, 99):.2f} s; router's memory {self.router_mib:.0f} MiB"
        )


class Crowd:
    """Streams that all begin at once."""

    def __init__(self, expected: dict[str, tuple[int, ...]]) -> None:
        self.failed: Counter[str] = Counter()
        self.records: list[Record] = []
        self.most = 0
        self._expected = expected
        self._running = 0

    async def run(self, router: str, works: Sequence[Work], num_streams: int) -> None:
        num_clients = -(-num_streams // _STREAMS_PER_CLIENT)
        clients = [AsyncClient(router) for _ in range(num_clients)]
        try:
            await asyncio.gather(
                *(
                    self._stream(clients[at % num_clients], works[at % len(works)])
                    for at in range(num_streams)
                )
            )
        finally:
            for client in clients:
                await client.aclose()

    async def _stream(self, client: AsyncClient, work: Work) -> None:
        record = Record(work.name, time.monotonic())
        self.records.append(record)
        self._running += 1
        self.most = max(self.most, self._running)
        try:
            result = await follow(client, work, record)
            if result.token_ids != self._expected[work.name]:
                self.failed["changed"] += 1
        except TreecastError as error:
            self.failed[error.reason] += 1
        finally:
            self._running -= 1


def ask_health(address: str, stop: Event, told: Connection) -> None:
    """Ask until told to stop, then send the latencies, in ms. Run in a process of its own: one that
    reads 2,000 streams answers itself late.
    """
    latencies_ms: list[float] = []
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # untyped
        while not stop.wait(_ASK_EVERY_S):
            began_s = time.perf_counter()
            try:
                stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
                latencies_ms.append(1000 * (time.perf_counter() - began_s))
            except grpc.RpcError:
                latencies_ms.append(float("inf"))
    told.send(latencies_ms)


class HealthProbe:
    """Asks a router's health all the time; a context manager."""

    def __init__(self, address: str) -> None:
        spawned = multiprocessing.get_context("spawn")
        self._stop = spawned.Event()
        self._ours, theirs = spawned.Pipe(duplex=False)
        arguments = (address, self._stop, theirs)
        self._process = spawned.Process(target=ask_health, args=arguments, daemon=True)
        self.latencies_ms: tuple[float, ...] = ()

    def __enter__(self) -> Self:
        self._process.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self.latencies_ms = tuple(self._ours.recv())
        self._process.join()


async def measure(settings: ChaosSettings, works: Sequence[Work], num_streams: int) -> Outcome:
    """Start a mesh and crowd it."""
    async with ChaosMesh(settings) as mesh:
        crowd = Crowd(await undisturbed(mesh, works))
        [router] = mesh.router_addresses
        with HealthProbe(router) as probe:
            began_s = time.monotonic()
            await crowd.run(router, works, num_streams)
            seconds = time.monotonic() - began_s
        return Outcome(
            num_streams,
            crowd.failed,
            crowd.most,
            seconds,
            probe.latencies_ms,
            tuple(record.pause_s for record in crowd.records),
            rss_mib(mesh.processes["router-0"]),
        )


def crowd_settings(num_streams: int, num_verifiers: int, step_s: float) -> ChaosSettings:
    """One router, and verifiers that take an equal share of the streams each, without drafts."""
    log_dir = new_log_dir(default_cache_dir() / "logs")
    share = -(-num_streams // num_verifiers)
    return ChaosSettings(
        MeshSettings(engine="toy", num_verifiers=num_verifiers, speculators=(), torch_threads=1),
        log_dir,
        num_routers=1,
        toy_step_s=step_s,
        further_verifier_flags={
            "max_running": share,
            "max_rows": share * 8,
            "pool_tokens": share * 128,
        },
        further_router_flags={"queue_limit": num_streams},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if no stream failed."""
    parser = argparse.ArgumentParser(prog="treecast.bench.streams", description=__doc__)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--verifiers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=12, help="of each stream")
    parser.add_argument("--step-s", type=float, default=2.0, help="time of a toy step")
    options = parser.parse_args(argv)
    settings = crowd_settings(options.streams, options.verifiers, options.step_s)
    outcome = asyncio.run(measure(settings, toy_works(16, options.tokens), options.streams))
    print(outcome)
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
