"""What guesses of output lengths are worth: latency per token under four schedules, side by side.

    python -m treecast.bench.lengths [--seconds 60] [--schedule length]

Four meshes of processes, each a router and a toy verifier of a few slots, run at once and are sent
the same open-loop trace at the same instants, so that whatever disturbs the machine disturbs all:

- fcfs: no guesses, first come first served;
- learned: `--length-predictor history`, which begins knowing nothing, and `--queue-order shortest`;
- oracle: `--length-predictor max-tokens`, and each request's `max_tokens` is its true length;
- shuffled, the control: the same, but `max_tokens` is beyond every length, by the true length of
  *another* request: the order is one of guesses that have nothing to do with their requests.

Requests are chat-like: a system prompt, one of a few task templates, a user's words; a quarter of
the tasks have long answers. Nothing cuts an answer short: it ends by a stop token, the same one for
all requests. The toy model's greedy text follows from its last two tokens, so a prompt's last two
are chosen to lead to the stop token after as many steps as its task's length says. But for the
oracle and the control all requests have one and the same `max_tokens`, so the prompt alone tells.

Latency is from the instant a request was to be sent to its last token; normalised latency is that
divided by the output's tokens. The first part of the trace is left out for all four alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from treecast import AsyncClient, SamplingParams
from treecast.client import RetryPolicy
from treecast.services.local import LocalMesh, MeshSettings

from .scrape import scrape

VOCABULARY = 97
STOP = 0
SHORT, LONG = range(4, 17), range(150, 301)
LONG_SHARE = 0.25
LIMIT = LONG.stop
TASKS = 8
CLIENTS = 4
"""Connections of each arm: gRPC bears 100 streams on one."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request of the trace: when it is sent, and how many tokens its answer has."""

    at_s: float
    prompt: list[int]
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class Arm:
    """One way to schedule: the router's flags, and what each request says as `max_tokens`.

    Attributes:
        limit: of a request's true length and of another's.
    """

    name: str
    router_flags: Mapping[str, object]
    limit: Callable[[int, int], int]


ARMS = (
    Arm("fcfs", {"length_predictor": "none"}, lambda own, other: LIMIT),
    Arm("learned", {"queue_order": "shortest"}, lambda own, other: LIMIT),
    Arm(
        "oracle",
        {"queue_order": "shortest", "length_predictor": "max-tokens"},
        lambda own, other: own,
    ),
    Arm(
        "shuffled",
        {"queue_order": "shortest", "length_predictor": "max-tokens"},
        lambda own, other: LIMIT + other,
    ),
)


@dataclass(frozen=True, slots=True)
class Answer:
    ask: Ask
    latency_s: float

    @property
    def normalised_s(self) -> float:
        return self.latency_s / self.ask.length


def steps_to_stop(before_last: int, last: int) -> int:
    """Tokens of the toy's greedy text after these two, up to and with the stop token."""
    for step in range(1, VOCABULARY**2):
        before_last, last = last, (3 * last + before_last + 1) % VOCABULARY
        if last == STOP:
            return step
    return VOCABULARY**2


def endings() -> dict[int, list[tuple[int, int]]]:
    """By length, the last two tokens of prompts whose answers have it."""
    found: dict[int, list[tuple[int, int]]] = {}
    words = range(1, VOCABULARY)
    for pair in ((a, b) for a in words for b in words):
        found.setdefault(steps_to_stop(*pair), []).append(pair)
    return found


class Trace:
    """Tasks whose answers have lengths of their own, and prompts of them."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._endings = endings()
        self._system = self._words(24)
        lengths = [LONG] * round(TASKS * LONG_SHARE)
        lengths += [SHORT] * (TASKS - len(lengths))
        self._tasks = [(self._words(12), self._reached(of)) for of in lengths]

    def _words(self, count: int) -> list[int]:
        return [self._rng.randrange(1, VOCABULARY) for _ in range(count)]

    def _reached(self, lengths: range) -> list[int]:
        return [length for length in lengths if length in self._endings]

    @property
    def mean_length(self) -> float:
        return float(np.mean([np.mean(lengths) for _, lengths in self._tasks]))

    def longest(self) -> Ask:
        return self._ask(0.0, self._tasks[0][0], self._tasks[0][1][-1])

    def asks(self, per_s: float, seconds: float) -> list[Ask]:
        """Poisson arrivals, the tasks in random order."""
        asks, at_s = [], 0.0
        while (at_s := at_s + self._rng.expovariate(per_s)) < seconds:
            words, lengths = self._rng.choice(self._tasks)
            asks.append(self._ask(at_s, words, self._rng.choice(lengths)))
        return asks

    def _ask(self, at_s: float, words: list[int], length: int) -> Ask:
        ending = self._rng.choice(self._endings[length])
        user = self._words(self._rng.randint(3, 9))
        return Ask(at_s, [*self._system, *words, *user, *ending], length)


class Caller:
    """Sends requests to one arm's mesh."""

    def __init__(self, arm: Arm, address: str) -> None:
        self.arm = arm
        retry = RetryPolicy(attempts_to_start=1)
        self._clients = [AsyncClient(address, retry) for _ in range(CLIENTS)]

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()

    async def answer(self, number: int, ask: Ask, other: int, due_s: float) -> Answer:
        """Raises ValueError if the answer's length is not what the prompt led to."""
        sampling = SamplingParams(
            temperature=0, max_tokens=self.arm.limit(ask.length, other), stop_token_ids=(STOP,)
        )
        client = self._clients[number % CLIENTS]
        result = await client.generate(ask.prompt, sampling, max_nodes=0).result()
        if len(result.token_ids) != ask.length:
            raise ValueError(f"an answer has {len(result.token_ids)} tokens, not {ask.length}")
        return Answer(ask, time.monotonic() - due_s)

    async def follow(self, asks: Sequence[Ask], others: Sequence[int]) -> list[Answer]:
        began_s = time.monotonic()
        tasks = []
        async with asyncio.TaskGroup() as group:
            for number, (ask, other) in enumerate(zip(asks, others, strict=True)):
                due_s = began_s + ask.at_s
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                tasks.append(group.create_task(self.answer(number, ask, other, due_s)))
        return [task.result() for task in tasks]


async def token_s(callers: Sequence[Caller], ask: Ask, slots: int) -> float:
    """Seconds of a token while all slots of all arms are taken."""
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for caller in callers:
            for number in range(slots):
                group.create_task(caller.answer(number, ask, ask.length, began_s))
    return (time.monotonic() - began_s) / ask.length


async def measure(
    addresses: Mapping[Arm, str], options: argparse.Namespace
) -> tuple[float, dict[str, list[Answer]]]:
    """The requests per second that were sent, and each arm's answers."""
    callers = [Caller(arm, address) for arm, address in addresses.items()]
    trace = Trace(options.seed)
    try:
        took_s = await token_s(callers, trace.longest(), options.slots)
        per_s = options.load * options.slots / (took_s * trace.mean_length)
        asks = trace.asks(per_s, options.seconds)
        others = [ask.length for ask in asks]
        random.Random(options.seed).shuffle(others)
        found = await asyncio.gather(*(caller.follow(asks, others) for caller in callers))
    finally:
        for caller in callers:
            await caller.close()
    return per_s, {caller.arm.name: one for caller, one in zip(callers, found, strict=True)}


def mesh_of(arm: Arm, folder: Path, options: argparse.Namespace) -> LocalMesh:
    """A router and a verifier whose step takes the same time whatever is in it."""
    (logs := folder / arm.name).mkdir()
    flags = {
        "toy_step_s": options.step_ms / 1000,
        "max_running": options.slots,
        "pool_tokens": 64 * 1024,
    }
    if options.schedule and arm.name != "fcfs":
        flags["schedule"] = options.schedule
    return LocalMesh(
        MeshSettings(
            engine="toy",
            speculators=(),
            log_dir=logs,
            verifier_flags=flags,
            router_flags={"queue_limit": 4096, **arm.router_flags},
        )
    )


def figures(answers: Sequence[Answer], after_s: float) -> dict[str, float]:
    """Milliseconds; of those sent after the first part of the trace."""
    counted = [one for one in answers if one.ask.at_s >= after_s]
    per_token = [1000 * one.normalised_s for one in counted]
    whole = [1000 * one.latency_s for one in counted]
    long = [1000 * one.latency_s for one in counted if one.ask.length >= LONG.start]
    return {
        "requests": len(counted),
        "normalised_ms_mean": float(np.mean(per_token)),
        "normalised_ms_p99": float(np.percentile(per_token, 99)),
        "latency_ms_mean": float(np.mean(whole)),
        "latency_ms_p99": float(np.percentile(whole, 99)),
        "long_latency_ms_mean": float(np.mean(long)),
        "long_latency_ms_max": max(long),
    }


def doublings(mesh: LocalMesh) -> dict[str, tuple[int, float]]:
    """What the router measured of its guesses: by source, how many and how far off on average."""
    sums: dict[str, dict[str, float]] = {"sum": {}, "count": {}}
    for one in scrape(mesh.processes["router"]):
        for kind, found in sums.items():
            if one.name == f"treecast_router_length_error_doublings_{kind}":
                found[one.labels["source"]] = one.value
    return {
        source: (int(count), sums["sum"][source] / count)
        for source, count in sums["count"].items()
        if count
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="treecast.bench.lengths", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=60.0, help="of the trace")
    parser.add_argument("--load", type=float, default=0.85, help="share of the slots' time")
    parser.add_argument("--warm-up", type=float, default=0.25, help="share left out at first")
    parser.add_argument("--slots", type=int, default=4, help="requests in one verifier's step")
    parser.add_argument("--step-ms", type=float, default=20.0, help="of the toy engine")
    parser.add_argument("--schedule", help="the verifier's, of all arms but fcfs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line per arm, or JSON."""
    options = parse(argv)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        meshes = {arm: stack.enter_context(mesh_of(arm, Path(folder), options)) for arm in ARMS}
        addresses = {arm: mesh.router_address for arm, mesh in meshes.items()}
        per_s, answers = asyncio.run(measure(addresses, options))
        errors = {arm.name: doublings(mesh) for arm, mesh in meshes.items()}
    after_s = options.warm_up * options.seconds
    rows = {name: figures(found, after_s) for name, found in answers.items()}
    if options.json:
        print(json.dumps({"requests_per_s": per_s, "arms": rows, "guesses": errors}))
        return 0
    print(f"{per_s:.2f} requests/s to each; ms per output token, and ms of whole answers")
    titles = ("requests", "mean/tok", "p99/tok", "mean", "p99", "mean long", "max long")
    print(f"{'':10}" + "".join(f"{title:>11}" for title in titles))
    for name, row in rows.items():
        print(f"{name:10}" + "".join(f"{value:11.0f}" for value in row.values()))
    for name, by_source in errors.items():
        for source, (count, off) in by_source.items():
            print(f"{name}: {count} guesses from {source}, off by {off:.2f} doublings on average")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
