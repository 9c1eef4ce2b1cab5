"""What weights of fewer bits cost and give: `python -m treecast.bench.weights`.

Loads a model once for each kind of weights, and prints by kind: how much memory the process grew
by, a step's time by its number of rows (kinds interleaved, medians), and how far the model is from
itself with float32 weights on held-out text: the mean Kullback-Leibler divergence of its next-token
distributions, and how often its likeliest token is the same.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import psutil
from numpy.typing import NDArray

from treecast.bench.machine import describe_machine, measure_ceilings
from treecast.bench.prompts import DEFAULT_PROMPTS, read_prompts
from treecast.checkpoints import ensure_default_target
from treecast.engine.base import Engine, KVSequence, Segment
from treecast.engine.openmp import spin_briefly
from treecast.settings import Weights

if TYPE_CHECKING:
    from treecast.engine.hf import HFEngine

REFERENCE: Weights = "float32"
KINDS: tuple[Weights, ...] = get_args(Weights)
ROWS = (1, 8, 24, 128)
CONTEXT = 192
POOL_TOKENS = 1024
_MIB = 2**20

Clock = Callable[[], float]
Rows = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Weighed:
    """What was found of one kind.

    Attributes:
        grown_mib: by how much the process's memory grew when the model was loaded.
        step_ms: median by number of rows.
        divergence: mean over positions, in nats.
        agreement: share of positions with the same likeliest token.
    """

    weights: str
    grown_mib: float
    step_ms: Mapping[int, float]
    divergence: float
    agreement: float


def weigh(
    folder: Path,
    kinds: Sequence[Weights],
    texts: Sequence[Sequence[int]],
    threads: int,
    repeats: int,
    rows: Sequence[int] = ROWS,
    clock: Clock = time.perf_counter,
) -> list[Weighed]:
    """Load and measure each kind; blocks for long.

    Args:
        kinds: `float32`, which the others are held against, is loaded in any case.
        texts: token ids.
        repeats: timed steps of each number of rows.
        clock: by which steps are timed.
    """
    ordered = [REFERENCE, *(kind for kind in kinds if kind != REFERENCE)]
    _load(folder, REFERENCE, threads)  # libraries come with the first one
    engines, grown = {}, {}
    for kind in ordered:
        before = _resident_mib()
        engines[kind] = _load(folder, kind, threads)
        grown[kind] = _resident_mib() - before
    times = _step_times(engines, rows, repeats, clock)
    expected = [_log_probs(engines[REFERENCE], text) for text in texts]
    found = []
    for kind, engine in engines.items():
        apart = _apart(expected, [_log_probs(engine, text) for text in texts])
        found.append(Weighed(kind, grown[kind], times[kind], *apart))
    return [one for one in found if one.weights in kinds]


def _load(folder: Path, kind: Weights, threads: int) -> HFEngine:
    from treecast.engine.hf import HFEngine

    return HFEngine.load(folder, weights=kind, pool_tokens=POOL_TOKENS, threads=threads)


def _resident_mib() -> float:
    """Of this process, after what is not used has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return float(psutil.Process().memory_info().rss / _MIB)


def _step_times(
    engines: Mapping[Weights, Engine], rows: Sequence[int], repeats: int, clock: Clock
) -> dict[Weights, dict[int, float]]:
    prefixes = {kind: _prefix(engine) for kind, engine in engines.items()}
    times: dict[Weights, dict[int, list[float]]] = {
        kind: {count: [] for count in rows} for kind in engines
    }
    for turn in range(repeats + 1):  # the first does not count
        for count in rows:
            for kind, engine in engines.items():
                seconds = _step_s(engine, prefixes[kind], count, clock)
                if turn:
                    times[kind][count].append(seconds)
    return {
        kind: {count: 1000 * statistics.median(each) for count, each in by_rows.items()}
        for kind, by_rows in times.items()
    }


def _prefix(engine: Engine) -> KVSequence:
    length = min(CONTEXT, engine.info.context_tokens // 2)
    sequence = engine.allocate(length + max(ROWS))
    engine.forward([Segment.chain(sequence, [5] * length, [])])
    engine.commit(sequence, range(length))
    return sequence


def _step_s(engine: Engine, sequence: KVSequence, rows: int, clock: Clock) -> float:
    """A step of siblings, all of them wanted."""
    segment = Segment(sequence, [7] * rows, [-1] * rows, range(rows))
    began = clock()
    engine.forward([segment])
    seconds = clock() - began
    engine.truncate(sequence, sequence.length)
    return seconds


def _log_probs(engine: Engine, text: Sequence[int]) -> Rows:
    """[positions, vocab] of the token after each."""
    sequence = engine.allocate(len(text))
    (rows,) = engine.forward([Segment.chain(sequence, text, range(len(text)))])
    logits = np.stack([rows[i] for i in range(len(rows))])
    engine.free(sequence)
    logits -= logits.max(-1, keepdims=True)
    found: Rows = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return found


def _apart(expected: Sequence[Rows], found: Sequence[Rows]) -> tuple[float, float]:
    """Mean divergence of `found` from `expected`, and the share of equal likeliest tokens."""
    divergence = [
        (np.exp(ours) * (ours - theirs)).sum(-1)
        for ours, theirs in zip(expected, found, strict=True)
    ]
    same = [
        ours.argmax(-1) == theirs.argmax(-1) for ours, theirs in zip(expected, found, strict=True)
    ]
    return float(np.concatenate(divergence).mean()), float(np.concatenate(same).mean())


def held_out(folder: Path, prompts: Path, limit: int | None, most_tokens: int) -> list[list[int]]:
    """Token ids of the prompts' texts, each cut to so many."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [tokenizer.encode(prompt.text).ids for prompt in read_prompts(prompts, limit)]
    return [text[:most_tokens] for text in texts if len(text) > 1]


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line for each kind, or JSON."""
    parser = argparse.ArgumentParser(description="What weights of fewer bits cost and give.")
    parser.add_argument("--model", type=Path, default=None, help="folder; the default model's")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of weights to compare"
    )
    parser.add_argument("--prompts", type=Path, default=DEFAULT_PROMPTS, help="held-out text")
    parser.add_argument("--limit", type=int, default=None, help="use only this many prompts")
    parser.add_argument("--max-tokens", type=int, default=96, help="of each prompt")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=25, help="timed steps of each size")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count one thread's time on the processor, as other processes take theirs; with "
        "--threads 1",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(argv)
    folder = given.model or ensure_default_target()
    spin_briefly()
    texts = held_out(folder, given.prompts, given.limit, given.max_tokens)
    if given.cpu_time and given.threads != 1:
        parser.error(f"--cpu-time counts one thread; --threads is {given.threads}")
    clock = time.thread_time if given.cpu_time else time.perf_counter
    found = weigh(folder, given.kinds, texts, given.threads, given.repeats, clock=clock)
    ceilings = measure_ceilings(clock)
    if given.json:
        machine = describe_machine() | {"ceilings": asdict(ceilings)}
        print(json.dumps({"machine": machine, "found": [asdict(one) for one in found]}))
        return
    print(
        f"{describe_machine()['processor']}, {given.threads} threads, {sum(map(len, texts))} tokens"
    )
    print(
        f"memory is read at {ceilings.read_bytes_per_s / 1e9:.1f} GB/s, float32 multiplied and "
        f"added {ceilings.products_per_s / 1e9:.1f} billion times a second"
    )
    for one in found:
        steps = " / ".join(f"{ms:.1f}" for ms in one.step_ms.values())
        sizes = " / ".join(map(str, one.step_ms))
        print(
            f"{one.weights:9} {one.grown_mib:6.0f} MiB; a step of {sizes} rows {steps} ms; "
            f"divergence {one.divergence:.5f}, same token {100 * one.agreement:.1f}%"
        )


if __name__ == "__main__":
    main()
