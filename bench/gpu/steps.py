"""Steps of a whole model on a device, plain decoding, and what trees make of it, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from treecast.decoding.local import generate
from treecast.drafting.ngram import NgramDrafter
from treecast.engine.base import Segment
from treecast.engine.hf import HFEngine
from treecast.sampling.params import SamplingParams

from .ceilings import Ceilings

_POOL_TOKENS = 65536
_REPEATS = 30


@dataclass(frozen=True, slots=True)
class StepFigure:
    """Steps at some context; seconds from asking for a pass to knowing its tokens."""

    numerics: str
    context: int
    floor_s: float
    one_row_s: float
    tree_rows: int
    tree_s: float


@dataclass(frozen=True, slots=True)
class DecodingFigure:
    """Tokens a second of one stream, greedily; `floor` is weights over measured bandwidth."""

    contender: str
    tokens_per_s: float
    tokens_per_step: float
    floor_tokens_per_s: float


def load(folder: Path, numerics: Literal["exact", "fast"], device: str) -> HFEngine:
    """The engine as a verifier loads it."""
    return HFEngine.load(
        folder, dtype="bfloat16", numerics=numerics, device=device, pool_tokens=_POOL_TOKENS
    )


def weight_bytes(folder: Path) -> int:
    """Bytes of a saved model's tensors: what a step reads at least."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def step_figure(
    engine: HFEngine, numerics: str, context: int, num_bytes: int, ceilings: Ceilings
) -> StepFigure:
    """A step of one row and one of a root with 63 nodes, behind `context` positions."""
    sequence = engine.allocate(context + 128)
    vocab = engine.info.vocab_size
    for begin in range(0, context, 128):
        count = min(128, context - begin)
        chunk = [(7 * token + 11) % vocab for token in range(begin, begin + count)]
        engine.forward([Segment.chain(sequence, chunk, [])])
        engine.commit(sequence, range(count))
    times = {rows: _step_s(engine, sequence, rows) for rows in (1, 64)}
    engine.free(sequence)
    return StepFigure(numerics, context, num_bytes / ceilings.bytes_per_s, times[1], 64, times[64])


def _step_s(engine: HFEngine, sequence: Any, num_rows: int) -> float:
    """The first steps of a size are compiled and captured, so they are not counted."""
    parents = [(row - 1) // 2 if row else -1 for row in range(num_rows)]
    tokens = [(13 * row + 5) % engine.info.vocab_size for row in range(num_rows)]
    times = []
    for repeat in range(_REPEATS + 4):
        begin = time.perf_counter()
        engine.forward([Segment(sequence, tokens, parents, range(num_rows))])
        if repeat >= 4:
            times.append(time.perf_counter() - begin)
        engine.truncate(sequence, sequence.length)
    return statistics.median(times)


def decoding_figures(
    engine: HFEngine,
    folder: Path,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    num_bytes: int,
    ceilings: Ceilings,
    device: str = "cuda",
) -> list[DecodingFigure]:
    """Our plain decoding, ours with lookup trees, and transformers' `generate`, by turns."""
    floor = ceilings.bytes_per_s / num_bytes
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    peer = _Transformers(folder, device)
    totals = {name: [0, 0, 0.0] for name in ("plain", "lookup trees", "transformers")}
    for turn, prompt in enumerate([prompts[0], *prompts]):
        for name, total in totals.items():
            begin = time.perf_counter()
            if name == "transformers":
                count = steps = peer.answer(prompt, max_tokens)
            else:
                drafter = NgramDrafter(1) if name == "lookup trees" else None
                done = generate(engine, prompt, sampling, 0, drafter, max_nodes=63)
                count, steps = len(done.tokens), done.steps
            if turn:  # the first answer warms up
                seconds = time.perf_counter() - begin
                totals[name] = [total[0] + count, total[1] + steps, total[2] + seconds]
    return [
        DecodingFigure(name, tokens / seconds, tokens / steps, floor)
        for name, (tokens, steps, seconds) in totals.items()
    ]


class _Transformers:
    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self._model = model.eval().to(device)

    def answer(self, prompt: Sequence[int], max_tokens: int) -> int:
        given = torch.tensor([list(prompt)], device=self._model.device)
        output = self._model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=max_tokens,
            do_sample=False,
        )
        return int(output.shape[1] - given.shape[1])
