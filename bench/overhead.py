"""What the mesh adds to the engine's time: router, streams and SDK, with an engine that sleeps.

`python -m treecast.bench.overhead` starts a whole mesh whose toy engine takes a fixed time per
step, lets 1, 8 and 64 sessions stream through it, and prints what a step and a first token take
beyond the engine's own time, which the verifier measures. The SDK's side is included, on the same
cores. Sessions begin at once: beside others, a first token waits for the step under way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import asdict, dataclass

import numpy as np
from rich.console import Console

from treecast.bench.mesh_phases import phase_sums
from treecast.checkpoints import default_cache_dir
from treecast.client.aio import AsyncClient
from treecast.sampling.params import SamplingParams
from treecast.services.local.logs import new_log_dir
from treecast.services.local.mesh import LocalMesh
from treecast.services.local.settings import MeshSettings

_PROMPT = [5, 6, 7]
_ENGINE_PHASES = ("forward", "walk")


@dataclass(frozen=True, slots=True)
class Overhead:
    """Milliseconds beyond the engine's, over all steps of all sessions.

    Attributes:
        engine_ms: the engine's own time per step, forward pass and picks, as a mean.
        step_ms_p50, step_ms_p99: between two deliveries to the client, less `engine_ms`.
        first_ms_p50: from the call to the first token, less `engine_ms`.
    """

    sessions: int
    engine_ms: float
    step_ms_p50: float
    step_ms_p99: float
    first_ms_p50: float


@dataclass(frozen=True, slots=True)
class _Timeline:
    """When a request was made, and when each of its tokens came; seconds."""

    asked: float
    came: tuple[float, ...]


async def measure(mesh: LocalMesh, sessions: int, tokens: int) -> Overhead:
    """Stream `tokens` to each of `sessions` at once."""
    async with AsyncClient(mesh.router_address) as client:
        await _stream(client, 4)
        before = _engine_s(mesh)
        timelines = await asyncio.gather(*(_stream(client, tokens) for _ in range(sessions)))
        after = _engine_s(mesh)
    engine_ms = 1000 * (after[0] - before[0]) / (after[1] - before[1])
    steps_ms = 1000 * np.concatenate([np.diff(each.came) for each in timelines])
    firsts_ms = [1000 * (each.came[0] - each.asked) for each in timelines]
    low, high = np.percentile(steps_ms, [50, 99]) - engine_ms
    first = float(np.median(firsts_ms)) - engine_ms
    return Overhead(sessions, engine_ms, float(low), float(high), first)


async def _stream(client: AsyncClient, tokens: int) -> _Timeline:
    asked, came = time.perf_counter(), []
    sampling = SamplingParams(temperature=0, max_tokens=tokens)
    async for chunk in client.generate(_PROMPT, sampling, max_nodes=0):
        came += [time.perf_counter()] * len(chunk.token_ids)
    return _Timeline(asked, tuple(came))


def _engine_s(mesh: LocalMesh) -> tuple[float, float]:
    """Seconds in the engine, and steps."""
    sums = phase_sums(mesh.processes["verifier-0"])
    return sum(sums[phase].seconds for phase in _ENGINE_PHASES), sums["forward"].count


def main() -> None:
    """Print one line per number of sessions, or JSON."""
    parser = argparse.ArgumentParser(description="What the mesh adds to the engine's time.")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 8, 64], help="at once")
    parser.add_argument("--tokens", type=int, default=300, help="tokens of each session")
    parser.add_argument("--step-ms", type=float, default=10.0, help="of the toy engine")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    settings = MeshSettings(
        engine="toy",
        speculators=(),
        log_dir=new_log_dir(default_cache_dir() / "logs"),
        verifier_flags={"toy_step_s": arguments.step_ms / 1000, "max_running": 64},
    )
    console = Console(stderr=arguments.json)
    with LocalMesh(settings) as mesh:
        found = []
        for sessions in arguments.sessions:
            one = asyncio.run(measure(mesh, sessions, arguments.tokens))
            found.append(asdict(one))
            console.print(
                f"{one.sessions:3} sessions: engine {one.engine_ms:.2f} ms a step; added per step "
                f"{one.step_ms_p50:.2f} (p99 {one.step_ms_p99:.2f}), to the first token "
                f"{one.first_ms_p50:.2f}",
                soft_wrap=True,
            )
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
