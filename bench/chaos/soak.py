"""A long run: `python -m treecast.bench.chaos.soak --requests 200000`; Ctrl-C ends it early.

Memory of each process is read along the way and its slope fitted, once it has warmed up. What was
counted is appended to a file, so that a later run of the same file goes on with the number.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from treecast.checkpoints import default_cache_dir
from treecast.services.local import MeshSettings
from treecast.services.local.logs import new_log_dir
from treecast.wire.lifecycle import stop_signal

from .audit import rss_mib, take_stock
from .load import Load, Outcome, toy_works, undisturbed
from .mesh import ChaosMesh, ChaosSettings
from .table import stock_table

_SAMPLE_EVERY_S = 2.0
_WARM_SHARE = 0.25
"""Of the requests, before memory counts: caches and pools fill first."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Memory of every process after so many requests of this run."""

    requests: int
    rss_mib: Mapping[str, float]


def slopes_kib(samples: Sequence[Sample]) -> dict[str, float]:
    """KiB per 1,000 requests by process, by least squares over the samples after the warm-up."""
    first = samples[-1].requests * _WARM_SHARE
    warm = [sample for sample in samples if sample.requests >= first]
    if len(warm) < 3 or warm[0].requests == warm[-1].requests:
        return {}
    thousands = [sample.requests / 1000 for sample in warm]
    return {
        name: 1024 * float(np.polyfit(thousands, [one.rss_mib[name] for one in warm], 1)[0])
        for name in warm[-1].rss_mib
    }


async def soak(mesh: ChaosMesh, load: Load, goal: int, limit_s: float) -> list[Sample]:
    """Sample until so many requests have ended, the time is up, or a signal asks for the end."""
    samples: list[Sample] = []
    stopped, end_s = stop_signal(), time.monotonic() + limit_s
    while (ended := sum(load.counts.values())) < goal and time.monotonic() < end_s:
        memory = {name: rss_mib(mesh.processes[name]) for name in mesh.services}
        samples.append(Sample(ended, memory))
        print(f"\r{ended:,} of {goal:,}", end="", file=sys.stderr, flush=True)
        load.records.clear()  # judged already; ours must not grow either
        with suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), _SAMPLE_EVERY_S)
            break
    print(file=sys.stderr)
    return samples


async def _run(options: argparse.Namespace) -> int:
    log_dir = new_log_dir(default_cache_dir() / "logs")
    mesh_settings = MeshSettings(engine="toy", num_verifiers=2, torch_threads=1, log_dir=log_dir)
    done = _read(options.state)
    works = toy_works(16, options.tokens)
    settings = ChaosSettings(mesh_settings, log_dir, toy_step_s=0.0)
    async with ChaosMesh(settings) as mesh:
        expected = await undisturbed(mesh, works)
        before = await take_stock(mesh)
        async with Load(mesh, works, expected, options.streams) as load:
            goal = options.requests - done
            samples = await soak(mesh, load, goal, options.limit_s)
        after = await take_stock(mesh)
    counts = {outcome.value: load.counts[outcome] for outcome in Outcome}
    done += sum(counts.values())
    options.state.write_text(json.dumps({"requests": done}))
    print(f"requests: {done:,} of {options.requests:,}; this run: {counts}")
    slopes = ", ".join(f"{name} {slope:+.1f}" for name, slope in slopes_kib(samples).items())
    print(f"memory in KiB per 1,000 requests: {slopes}\n\n{stock_table(before, after)}")
    return 0 if counts["same"] == sum(counts.values()) else 1


def _read(state: Path) -> int:
    with suppress(OSError, ValueError, KeyError):
        return int(json.loads(state.read_text())["requests"])
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if every stream was the same as undisturbed."""
    parser = argparse.ArgumentParser(prog="treecast.bench.chaos.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--streams", type=int, default=32, help="at once")
    parser.add_argument("--tokens", type=int, default=8, help="of each request")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="stop after this long")
    parser.add_argument(
        "--state", type=Path, default=Path("soak.json"), help="where the count is kept"
    )
    return asyncio.run(_run(parser.parse_args(argv)))


if __name__ == "__main__":
    raise SystemExit(main())
