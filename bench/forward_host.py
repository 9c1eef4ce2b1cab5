"""Where should the forward run: on a thread beside the event loop, or in a process of its own?

`python -m treecast.bench.forward_host` runs tree steps of the default model either way while the
event loop handles small messages at a fixed rate, interleaved, and prints the step time and how
late the loop's timer fired. A process keeps Python's lock to itself, but every step's rows must
travel back to whoever picks.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.connection
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from treecast.engine.openmp import load_on_thread

NODES = 16
CONTEXT = 192
STEPS = 40
ROUNDS = 3
MESSAGES_PER_S = 2000
"""About what 64 sessions cause at 30 steps a second."""


class Stepper:
    """The default model behind one prefilled sequence; one tree step at a time."""

    def __init__(self) -> None:
        from treecast.checkpoints import ensure_default_target
        from treecast.engine.base import Segment
        from treecast.engine.hf import HFEngine

        self._engine = HFEngine.load(ensure_default_target(), threads=2, pool_tokens=1024)
        self._sequence = self._engine.allocate(CONTEXT + NODES)
        self._engine.forward([Segment.chain(self._sequence, [5] * CONTEXT, [])])
        self._engine.commit(self._sequence, range(CONTEXT))
        self._tree = Segment(self._sequence, [7] * NODES, [-1] * NODES, range(NODES))

    def step(self) -> list[np.ndarray]:
        """[NODES] rows of float32 logits."""
        (rows,) = self._engine.forward([self._tree])
        self._engine.truncate(self._sequence, CONTEXT)
        return [rows[row] for row in range(NODES)]


def serve_steps(pipe: multiprocessing.connection.Connection) -> None:
    """The process: a step for every message, its rows back."""
    os.environ["OMP_NUM_THREADS"] = "2"
    stepper = Stepper()
    pipe.send_bytes(b"ready")
    while pipe.recv_bytes():
        pipe.send(stepper.step())


async def measure(step: Callable[[], object], thread: ThreadPoolExecutor) -> tuple[float, float]:
    """Median step in ms, and the 99th percentile of the loop's lateness in ms."""
    loop, late_ms, stopped = asyncio.get_running_loop(), [], asyncio.Event()

    async def traffic() -> None:
        while not stopped.is_set():
            due = loop.time() + 0.005
            await asyncio.sleep(0.005)
            late_ms.append(1000 * (loop.time() - due))
            for _ in range(int(MESSAGES_PER_S * 0.005)):
                bytes(bytearray(600)).hex()  # as much work as a frame's decoding

    task = asyncio.create_task(traffic())
    times_ms = []
    for _ in range(STEPS):
        began = time.perf_counter()
        await loop.run_in_executor(thread, step)
        times_ms.append(1000 * (time.perf_counter() - began))
    stopped.set()
    await task
    return statistics.median(times_ms), float(np.percentile(late_ms, 99))


def main() -> None:
    """Measure both, interleaved, and print medians over rounds."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=serve_steps, args=(theirs,), daemon=True)
    child.start()
    ours.recv_bytes()
    thread, stepper = load_on_thread(Stepper)

    def remote() -> object:
        ours.send_bytes(b"step")
        return ours.recv()

    found: dict[str, list[tuple[float, float]]] = {"thread": [], "process": []}
    for _ in range(ROUNDS):
        found["thread"].append(asyncio.run(measure(stepper.step, thread)))
        found["process"].append(asyncio.run(measure(remote, thread)))
    for name, runs in found.items():
        steps, lates = zip(*runs, strict=True)
        print(
            f"{name:8} step {statistics.median(steps):5.1f} ms ({min(steps):.1f}-{max(steps):.1f})"
            f"   loop late, 99th percentile {statistics.median(lates):.2f} ms"
        )
    ours.send_bytes(b"")
    child.join()


if __name__ == "__main__":
    main()
