"""Every fault: what is done to the mesh, and how it is undone again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from treecast.client import AsyncClient
from treecast.services.local.certificates import Authority

from .load import Work
from .mesh import ChaosMesh
from .proxy import Way

VANISHING = 16
"""Clients that come and vanish side by side."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One row of the table. `run` hurts the mesh and heals it."""

    name: str
    run: Callable[[ChaosMesh], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much of each is done."""

    hold_s: float = 5.0
    redis_s: float = 30.0
    num_cancels: int = 10_000
    num_frames: int = 1_000_000
    seed: int = 1


QUICK = Amounts(hold_s=2.5, redis_s=5.0, num_cancels=500, num_frames=20_000)


def process_faults(mesh: ChaosMesh, amounts: Amounts) -> list[Fault]:
    """Processes that die, hang, or are replaced."""
    first = {"verifier": "verifier-0", "speculator": mesh.speculators[0]}
    killed = [_kill(f"kill -9 a {role}", [name], amounts) for role, name in first.items()]
    stopped = [_freeze(f"SIGSTOP a {role}", [name], amounts) for role, name in first.items()]
    routers = mesh.routers  # clients stay where they have gone, so one of them is in no use
    return [
        Fault("rolling restart of everything", roll_all),
        *killed,
        _each("kill -9 each router", [_kill("", [name], amounts) for name in routers]),
        _kill("kill -9 both speculators", mesh.speculators, amounts),
        *stopped,
        _each("SIGSTOP each router", [_freeze("", [name], amounts) for name in routers]),
        _freeze("SIGSTOP both speculators", mesh.speculators, amounts),
        Fault(
            f"Redis killed, restarted empty after {amounts.redis_s:g} s",
            lambda mesh: _kill_and_restart(mesh, ["valkey"], amounts.redis_s),
        ),
        _freeze("SIGSTOP Redis", ["valkey"], amounts),
    ]


def link_faults(mesh: ChaosMesh, amounts: Amounts) -> list[Fault]:
    """Links that are slow or cut, one way or both."""
    hops = {"router-verifier": "verifier-0", "verifier-speculator": mesh.speculators[0]}
    faults = []
    for hop, name in hops.items():
        link = mesh.links[name]
        for what, ways in (
            ("both ways", link.ways),
            ("requests only", (link.there,)),
            ("answers only", (link.back,)),
        ):
            faults.append(Fault(f"{hop} link cut, {what}", _cut(ways, amounts.hold_s)))
        faults.append(Fault(f"{hop} link slow (200 ms each way)", _slow(link.ways, amounts.hold_s)))
    return faults


def vanishing_clients(works: Sequence[Work], amounts: Amounts) -> Fault:
    async def vanish(mesh: ChaosMesh) -> None:
        async with mesh.client() as client:
            names = iter(range(amounts.num_cancels))
            await asyncio.gather(*(_vanish(client, works, names) for _ in range(VANISHING)))

    return Fault(f"{amounts.num_cancels:,} clients that vanish", vanish)


async def _vanish(client: AsyncClient, works: Sequence[Work], numbers: Iterable[int]) -> None:
    """Leave before the first token, or after one or two."""
    for number in numbers:
        work = works[number % len(works)]
        stream = client.generate(work.prompt, work.sampling)
        try:
            async with asyncio.timeout(0.005 * (number % 8)):
                async for _ in stream:
                    break
        except TimeoutError:
            pass
        finally:
            await stream.aclose()


async def roll_all(mesh: ChaosMesh) -> None:
    """One after the other, each drained and started anew; the mesh is whole between two."""
    for name in mesh.services:
        await mesh.roll(name)
        await mesh.wait_whole()


async def rotate_certificates(mesh: ChaosMesh) -> None:
    """A new authority's certificates, as docs/security.md says: trust both, rotate, trust the new.

    Everything is restarted in between, so that every connection has been made anew, by processes
    that read their files earlier and those that read them later.
    """
    old, new = mesh.authority, Authority.make()
    mesh.issue(old, [old, new])
    await roll_all(mesh)
    mesh.issue(new, [old, new])
    await roll_all(mesh)
    mesh.issue(new, [new])
    await mesh.roll("router-0")


ROTATION = Fault("certificates and their authority rotated", rotate_certificates)


def _each(name: str, faults: Sequence[Fault]) -> Fault:
    """One after the other; the mesh is whole between two."""

    async def run(mesh: ChaosMesh) -> None:
        for fault in faults:
            await fault.run(mesh)
            await mesh.wait_whole()

    return Fault(name, run)


def _kill(name: str, victims: Sequence[str], amounts: Amounts) -> Fault:
    return Fault(name, lambda mesh: _kill_and_restart(mesh, victims, amounts.hold_s))


async def _kill_and_restart(mesh: ChaosMesh, victims: Sequence[str], hold_s: float) -> None:
    for victim in victims:
        await mesh.kill(victim)
    await asyncio.sleep(hold_s)
    for victim in victims:
        await mesh.restart(victim)


def _freeze(name: str, victims: Sequence[str], amounts: Amounts) -> Fault:
    async def freeze(mesh: ChaosMesh) -> None:
        for victim in victims:
            mesh.freeze(victim)
        await asyncio.sleep(amounts.hold_s)
        for victim in victims:
            mesh.thaw(victim)

    return Fault(name, freeze)


def _cut(ways: Sequence[Way], hold_s: float) -> Callable[[ChaosMesh], Awaitable[None]]:
    async def cut(mesh: ChaosMesh) -> None:
        for way in ways:
            way.cut()
        await asyncio.sleep(hold_s)
        for way in ways:
            way.heal()

    return cut


def _slow(ways: Sequence[Way], hold_s: float) -> Callable[[ChaosMesh], Awaitable[None]]:
    async def slow(mesh: ChaosMesh) -> None:
        for way in ways:
            way.delay_s = 0.2
        await asyncio.sleep(hold_s)
        for way in ways:
            way.heal()

    return slow
