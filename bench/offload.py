"""Weights that do not fit: what trees are worth when every pass must move them.

    python -m treecast.bench.offload [--model FOLDER] [--device-memory 0.3] [--gib-per-s 0.25]

answers prompts greedily in one process, plainly and with the shipped drafts beside n-gram lookup
(`decoding/local.py`), over one engine whose layers are streamed from disk past the kernel's cache;
and with `--peer` by transformers' generate over accelerate's disk offload of the same folder, in a
process of its own. They take turns at each prompt. Accelerate reads through the kernel's cache: on
a host with memory to spare its figure is that of a disk as quick as memory, unless its pages are
dropped before each pass (`--peer cold`).

`--gib-per-s` holds our reads to a slower disk's rate; figures of it are always labelled.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog

from treecast.bench.compare import Spread
from treecast.bench.machine import describe_machine
from treecast.bench.offload_memory import MemoryWatch
from treecast.bench.prompts import DEFAULT_PROMPTS, encode_chat, read_prompts
from treecast.checkpoints import ensure_default_drafts, ensure_default_target
from treecast.decoding.local import generate
from treecast.drafting.base import Drafter
from treecast.drafting.growth import BestFirst
from treecast.drafting.merge import MergedDrafter
from treecast.drafting.ngram import NgramDrafter
from treecast.drafting.ssm import SSMDrafter
from treecast.engine.hf import HFEngine
from treecast.engine.offload import Offload
from treecast.sampling.params import SamplingParams
from treecast.settings import GIB

_POOL_TOKENS = 1024
_CHUNK_TOKENS = 256
"""Prompt rows of a pass: each moves the weights once."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one contender needed for one prompt; `moved_bytes` are None where nobody counts."""

    contender: str
    prompt_id: str
    token_ids: tuple[int, ...]
    steps: int
    seconds: float
    moved_bytes: int | None

    @property
    def tokens_per_s(self) -> float:
        return len(self.token_ids) / self.seconds


class Contender(Protocol):
    """Something that answers prompts, greedily, one at a time."""

    name: str

    def answer(self, prompt_id: str, prompt_ids: Sequence[int], max_tokens: int) -> Answer:
        """Answer one prompt. Blocks."""


class Local:
    """treecast's whole loop in this process; plain without a drafter."""

    def __init__(self, name: str, engine: HFEngine, drafter: Drafter | None, nodes: int) -> None:
        self.name = name
        self._engine, self._drafter, self._nodes = engine, drafter, nodes

    def answer(self, prompt_id: str, prompt_ids: Sequence[int], max_tokens: int) -> Answer:
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
        moved, begun = self._engine.moved_bytes, time.perf_counter()
        done = generate(
            self._engine, prompt_ids, sampling, 0, self._drafter, self._nodes, _CHUNK_TOKENS
        )
        seconds = time.perf_counter() - begun
        moved = self._engine.moved_bytes - moved
        return Answer(self.name, prompt_id, tuple(done.tokens), done.steps, seconds, moved)


class Peer:
    """accelerate's disk offload, see `bench.offload_peer`."""

    def __init__(self, folder: Path, flags: argparse.Namespace) -> None:
        self.name = f"accelerate, {flags.peer} cache"
        command = [sys.executable, "-m", "treecast.bench.offload_peer", "--model", str(folder)]
        command += ["--device-memory", str(flags.device_memory), "--threads", str(flags.threads)]
        command += ["--dtype", flags.dtype, *(["--cold"] if flags.peer == "cold" else [])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.loaded = self._hear()

    def answer(self, prompt_id: str, prompt_ids: Sequence[int], max_tokens: int) -> Answer:
        said = self._ask({"prompt_ids": list(prompt_ids), "max_tokens": max_tokens})
        tokens = tuple(said["token_ids"])
        return Answer(self.name, prompt_id, tokens, len(tokens), said["seconds"], None)

    def memory(self) -> dict[str, float]:
        """Its own peaks, as `peak_memory` counts ours."""
        peaks: dict[str, float] = self._ask({"memory": True})
        return peaks

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, question: dict[str, object]) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        said: dict[str, Any] = json.loads(self._process.stdout.readline())
        return said


def interleave(
    contenders: Sequence[Contender],
    prompts: dict[str, list[int]],
    max_tokens: int,
    rounds: int,
    progress: Callable[[Answer], None],
) -> list[Answer]:
    """Let all answer each prompt in turn, whoever begins rotating."""
    answers = []
    for number in range(rounds):
        for place, (prompt_id, prompt_ids) in enumerate(prompts.items()):
            shift = (number + place) % len(contenders)
            for contender in (*contenders[shift:], *contenders[:shift]):
                answers.append(contender.answer(prompt_id, prompt_ids, max_tokens))
                progress(answers[-1])
    return answers


def summarize(answers: Sequence[Answer], name: str) -> dict[str, object]:
    """One contender's medians with quartiles, and how it stands to plain decoding, pair by pair."""
    mine = [one for one in answers if one.contender == name]
    plain = [one for one in answers if one.contender == "plain"]
    tokens = sum(len(one.token_ids) for one in mine)
    moved = [one.moved_bytes for one in mine if one.moved_bytes is not None]
    pairs = list(zip(mine, plain, strict=True))
    return {
        "tokens_per_s": asdict(Spread.of([one.tokens_per_s for one in mine])),
        "over_plain": asdict(Spread.of([a.tokens_per_s / b.tokens_per_s for a, b in pairs])),
        "tokens_per_step": tokens / sum(one.steps for one in mine),
        "mb_moved_per_token": sum(moved) / tokens / 1e6 if moved else None,
        "same_tokens_as_plain": sum(a.token_ids == b.token_ids for a, b in pairs),
        "answers": len(mine),
    }


def load(folder: Path, flags: argparse.Namespace) -> HFEngine:
    """The target with its layers on disk, as far as the share does not hold them."""
    rate = flags.gib_per_s and flags.gib_per_s * GIB
    share = Offload("disk", int(flags.device_memory * GIB), flags.scratch, rate)
    return HFEngine.load(
        folder,
        dtype=flags.dtype,
        numerics=flags.numerics,
        pool_tokens=_POOL_TOKENS,
        threads=flags.threads,
        offload=share,
    )


def _drafter(flags: argparse.Namespace) -> MergedDrafter:
    models = [
        SSMDrafter(
            HFEngine.load(folder, dtype=flags.dtype, threads=flags.threads), BestFirst(), name=name
        )
        for name, folder in zip(("ssm", "ssm-1", "ssm-2"), ensure_default_drafts(), strict=False)
    ]
    return MergedDrafter([*models, NgramDrafter()])


def _prompts(folder: Path, count: int) -> dict[str, list[int]]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return {
        prompt.id: encode_chat(tokenizer, prompt.text)
        for prompt in read_prompts(DEFAULT_PROMPTS, count)
    }


def measure(folder: Path, flags: argparse.Namespace) -> dict[str, object]:
    """Everything that is reported. Blocks for minutes."""
    with ExitStack() as stack:
        watch = stack.enter_context(MemoryWatch().watching())
        memory: dict[str, object] = {"before": watch.peaks}
        engine = load(folder, flags)
        stack.callback(engine.close)
        prompts = _prompts(folder, flags.prompts)
        contenders: list[Contender] = [Local("plain", engine, None, 0)]
        contenders[0].answer("", next(iter(prompts.values())), 4)
        memory["target_alone"] = watch.peaks
        contenders.append(Local("trees", engine, _drafter(flags), flags.nodes))
        peer = None
        if flags.peer != "none":
            peer = Peer(folder, flags)
            stack.callback(peer.close)
            contenders.append(peer)
        answers = interleave(contenders, prompts, flags.max_tokens, flags.rounds, _tell)
        memory["with_drafts"] = watch.peaks
        if peer is not None:
            memory[peer.name] = peer.memory() | peer.loaded
    figures: dict[str, object] = {one.name: summarize(answers, one.name) for one in contenders}
    return {"machine": describe_machine(), "peak_memory": memory, **figures}


def _tell(answer: Answer) -> None:
    print(
        f"{answer.contender} {answer.prompt_id}: {answer.tokens_per_s:.2f} tokens/s, "
        f"{answer.steps} steps",
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--device-memory", type=float, default=0.3, help="GiB for weights")
    parser.add_argument("--gib-per-s", type=float, help="as if the disk were so slow")
    parser.add_argument("--scratch", type=Path, help="folder of the scratch file")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--numerics", default="exact", choices=("exact", "fast"))
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--nodes", type=int, default=24, help="of a tree at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer", choices=("none", "warm", "cold"), default="none")
    flags = parser.parse_args()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    report = measure(flags.model or ensure_default_target(), flags)
    asked = {name: str(value) for name, value in vars(flags).items()}
    label = "throttled disk" if flags.gib_per_s else "the disk as it is"
    print(json.dumps({"label": label, "asked": asked, **report}, indent=2))


if __name__ == "__main__":
    main()
