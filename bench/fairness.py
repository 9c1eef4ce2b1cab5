"""A light tenant's latency alone, and beside a neighbour that sends ten times its quota.

    python -m treecast.bench.fairness [--seconds 20]

A mesh of processes with the toy engine, whose step takes the same time whatever is in it, so that
the wait for a place is all that a neighbour can cost. The bar: p99 at most doubles. The last row
is the control: the same load with one queue for both, first come first served.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from treecast import AsyncClient, SamplingParams
from treecast.client import RetryPolicy
from treecast.errors import Overloaded, TreecastError
from treecast.services.local import LocalMesh, MeshSettings
from treecast.services.router.keys import entry_of

PROMPT = [5, 6, 7]
ONCE = RetryPolicy(attempts_to_start=1)
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
STEP_S = 0.05
SLOTS = 4
LIGHT_PER_S = 1.0
QUOTA_PER_S = 3.0
TIMES_QUOTA = 10
BAR = 2.0


@dataclass
class Tally:
    """What became of one tenant's requests."""

    latencies_s: list[float] = field(default_factory=list)
    refused: int = 0
    failed: int = 0

    def quantile_ms(self, share: float) -> float:
        return 1000 * float(np.quantile(self.latencies_s, share))


async def send(client: AsyncClient, tally: Tally) -> None:
    began = time.monotonic()
    try:
        await client.generate(PROMPT, GREEDY, max_nodes=0).result()
    except Overloaded:
        tally.refused += 1
    except TreecastError:
        tally.failed += 1
    else:
        tally.latencies_s.append(time.monotonic() - began)


async def load(address: str, key: str, per_s: float, seconds: float) -> Tally:
    """Send requests at even intervals, however long each takes."""
    tally, loop = Tally(), asyncio.get_running_loop()
    began = loop.time()
    async with AsyncClient(address, ONCE, api_key=key) as client, asyncio.TaskGroup() as group:
        for number in range(int(per_s * seconds)):
            await asyncio.sleep(max(0.0, began + number / per_s - loop.time()))
            group.create_task(send(client, tally))
    return tally


def alone(address: str, key: str, per_s: float, seconds: float) -> Tally:
    return asyncio.run(load(address, key, per_s, seconds))


def both(address: str, seconds: float) -> tuple[Tally, Tally]:
    """Each in a process of its own, so that they meet in the mesh alone."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as clients:
        light = clients.submit(alone, address, "tc_light", LIGHT_PER_S, seconds)
        flood = TIMES_QUOTA * QUOTA_PER_S
        heavy = clients.submit(alone, address, "tc_heavy", flood, seconds)
        return light.result(), heavy.result()


def keys(tenants: tuple[str, str]) -> str:
    quota = {"requests_per_minute": round(60 * QUOTA_PER_S)}
    limits: list[dict[str, int | None]] = [{}, {**quota}]
    pairs = zip(("tc_light", "tc_heavy"), tenants, limits, strict=True)
    entries = [entry_of(key, tenant, limit) for key, tenant, limit in pairs]
    return "\n".join([*entries, entry_of("tc_admin", "ops", {}, admin=True)])


def mesh(tenants: tuple[str, str], folder: Path) -> LocalMesh:
    file = folder / "keys.toml"
    file.write_text(keys(tenants))
    return LocalMesh(
        MeshSettings(
            engine="toy",
            speculators=(),
            log_dir=folder,
            verifier_flags={"toy_step_s": STEP_S, "max_running": SLOTS},
            router_flags={"api_keys_file": file},
        )
    )


def row(name: str, light: Tally, heavy: Tally | None = None) -> str:
    text = f"{name:<34}{light.quantile_ms(0.5):8.0f}{light.quantile_ms(0.99):8.0f}"
    text += f"{len(light.latencies_s):8}{light.refused + light.failed:8}"
    return text if heavy is None else f"{text}{len(heavy.latencies_s):10}{heavy.refused:10}"


def run(seconds: float) -> float:
    """Print the table; returns how many times its p99 alone the light tenant's is beside."""
    print(f"{'light tenant':<34}{'p50 ms':>8}{'p99 ms':>8}{'served':>8}{'lost':>8}", end="")
    print(f"{'heavy got':>10}{'refused':>10}")
    with tempfile.TemporaryDirectory() as folder, mesh(("light", "heavy"), Path(folder)) as fair:
        before = alone(fair.router_address, "tc_light", LIGHT_PER_S, seconds)
        print(row("alone", before))
        light, heavy = both(fair.router_address, seconds)
        print(row(f"beside {TIMES_QUOTA} times a quota", light, heavy))
    with tempfile.TemporaryDirectory() as folder, mesh(("one", "one"), Path(folder)) as fifo:
        queued, crowd = both(fifo.router_address, seconds)
        print(row("the same in one queue (control)", queued, crowd))
    return light.quantile_ms(0.99) / before.quantile_ms(0.99)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=20.0, help="of load, three times")
    ratio = run(parser.parse_args().seconds)
    print(f"p99 beside is {ratio:.2f} times that alone; the bar is {BAR:g}")
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())
