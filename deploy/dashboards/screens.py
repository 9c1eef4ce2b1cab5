"""Pictures of the dashboards' panels, drawn by matplotlib from Prometheus' data of a real run.

`python -m treecast.dashboards.screens docs/img` runs the default mesh under traffic for some
minutes. With `--data FILE` the data are kept, or read if the file is there, and nothing is run.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

from treecast.bench.prompts import DEFAULT_PROMPTS, read_prompts
from treecast.client import Prompt
from treecast.services.local import LocalMesh, MeshSettings

from .debian import find_prometheus
from .draw import draw
from .generated import DASHBOARDS
from .prometheus import Prometheus
from .recording import Recording, record
from .traffic import run_traffic

_INTERVAL_S = 1.0
_WINDOW = "15s"
_STREAMS = 5
_MAX_TOKENS = 96
_READY_S = 900.0
"""Also where others take most of the cores."""


def run(minutes: float, threads: int) -> Recording:
    """Start a mesh and a Prometheus, send traffic, and ask for every panel."""
    settings = MeshSettings(
        torch_threads=threads,
        ready_timeout_s=_READY_S,
        verifier_flags={"max_running": 3, "pool_tokens": 4096},
    )
    prompts: list[Prompt] = [prompt.chat for prompt in read_prompts(DEFAULT_PROMPTS)]
    with LocalMesh(settings) as mesh:
        services = {name: one for name, one in mesh.processes.items() if name != "valkey"}
        targets = {name: str(one.metrics_address) for name, one in services.items()}
        with Prometheus(find_prometheus(), targets, _INTERVAL_S) as prometheus:
            start_s, seconds = time.time(), 60 * minutes
            asyncio.run(run_traffic(mesh.router_address, prompts, _STREAMS, seconds, _MAX_TOKENS))
            return record(prometheus, DASHBOARDS, start_s, time.time(), _WINDOW)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the dashboards' data of a real run.")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--minutes", type=float, default=4, help="of traffic")
    parser.add_argument("--threads", type=int, default=2, help="of the model's forward pass")
    parser.add_argument("--data", type=Path, help="keep the data here, or draw what is here")
    arguments = parser.parse_args()
    if arguments.data is not None and arguments.data.exists():
        recording = Recording.load(arguments.data)
    else:
        recording = run(arguments.minutes, arguments.threads)
        if arguments.data is not None:
            recording.save(arguments.data)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for dashboard in DASHBOARDS:
        path = arguments.folder / f"{dashboard.uid.removeprefix('treecast-')}.png"
        draw(dashboard, recording, path)
        print(path)


if __name__ == "__main__":
    main()
