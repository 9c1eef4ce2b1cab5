"""What it is worth to let shorter requests go first: `python -m treecast.bench.schedules`.

The verifier's own scheduler over the toy engine (`bare_loop.py`); time is counted in steps, so that
the machine does not matter. Requests come at random; 15% of the outputs are long. Lengths are
foretold exactly, within a factor of two or so, or not at all.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from rich.console import Console
from rich.table import Table

from treecast.bench.bare_loop import VOCAB, BareLoop
from treecast.services.verifier.requests import Request

Foretold = Literal["not", "exactly", "roughly"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to come: when, how long its output is, and is said to be."""

    at: int
    num_tokens: int
    foretold: int | None


def traffic(seed: int, count: int, foretold: Foretold) -> list[Arrival]:
    """Outputs of 8 to 40 tokens, or 300 tokens in 15% of cases; one comes every 14 steps or so."""
    rng = random.Random(seed)
    arrivals, at = [], 0.0
    for _ in range(count):
        at += rng.expovariate(1 / 14)
        length = 300 if rng.random() < 0.15 else rng.randint(8, 40)
        error = rng.lognormvariate(0, 0.7)
        guess = {"not": None, "exactly": length, "roughly": max(1, round(length * error))}
        arrivals.append(Arrival(int(at), length, guess[foretold]))
    return arrivals


@dataclass(frozen=True, slots=True)
class Served:
    """Steps from arrival to end, request by request, and the same per token of its output."""

    steps: list[int]
    per_token: list[float]
    preemptions: float


def serve(arrivals: Sequence[Arrival], schedule: str) -> Served:
    """Serve all of them, four at a time."""
    loop = BareLoop(
        64 * 24, max_running=4, max_waiting=len(arrivals), schedule=schedule, max_rows=64
    )
    coming, there = list(arrivals), dict[int, tuple[Arrival, Request]]()
    steps: list[int] = []
    per_token: list[float] = []
    for number in itertools.count():
        while coming and coming[0].at <= number:
            arrival, prompt = coming.pop(0), [len(coming) % VOCAB, 1]
            request = loop.submit(prompt, arrival.num_tokens, expected_tokens=arrival.foretold)
            there[request.handle] = arrival, request
        if not coming and not there:
            break
        if there:
            loop.step(number)
        for handle, (arrival, request) in list(there.items()):
            if request.tokens_left == 0:
                del there[handle]
                steps.append(number + 1 - arrival.at)
                per_token.append(steps[-1] / arrival.num_tokens)
    name = "treecast_verifier_preemptions_total"
    preemptions = loop.metrics.registry.get_sample_value(name, {"why": "length"}) or 0.0
    return Served(steps, per_token, preemptions)


def report(count: int, seeds: int) -> Table:
    """A row per schedule and foresight, over the same arrivals."""
    table = Table(title=f"{seeds} x {count} requests, 4 at a time; in steps")
    for name in ("schedule", "foretold", "mean", "median", "longest", "per token", "preemptions"):
        table.add_column(name, justify="left" if name in ("schedule", "foretold") else "right")
    cases: list[tuple[str, Foretold]] = [
        ("fcfs", "not"),
        ("length", "exactly"),
        ("length", "roughly"),
        ("length", "not"),
    ]
    for schedule, foretold in cases:
        runs = [serve(traffic(seed, count, foretold), schedule) for seed in range(seeds)]
        steps = sorted(itertools.chain.from_iterable(run.steps for run in runs))
        per_token = fmean(itertools.chain.from_iterable(run.per_token for run in runs))
        table.add_row(
            schedule,
            foretold,
            f"{fmean(steps):.0f}",
            str(steps[len(steps) // 2]),
            str(steps[-1]),
            f"{per_token:.2f}",
            f"{sum(run.preemptions for run in runs):.0f}",
        )
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=60, help="of one run")
    parser.add_argument("--seeds", type=int, default=3, help="runs")
    given = parser.parse_args(argv)
    Console().print(report(given.requests, given.seeds))


if __name__ == "__main__":
    main()
