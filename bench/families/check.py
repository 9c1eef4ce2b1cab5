"""One family at a time: what comes out of trees, beside transformers and beside plain decoding."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from treecast.bench.families.configs import VOCAB, make_config
from treecast.bench.families.drafting import RandomTrees
from treecast.decoding.local import generate
from treecast.drafting.base import Drafter
from treecast.drafting.growth import BestFirst
from treecast.drafting.ssm import SSMDrafter
from treecast.engine.base import Segment
from treecast.engine.hf import HFEngine
from treecast.errors import TreecastError
from treecast.sampling.noise import noise_key
from treecast.sampling.params import SamplingParams

_NODES = 16
_POOL_TOKENS = 1024
_WEIGHT_STD = 0.15

MOST_ERROR = 1e-3
"""Of a logit in float32; another attention gives 0.1 and more."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is compared for each family."""

    prompts: int = 3
    prompt_tokens: int = 40
    max_tokens: int = 40


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one family.

    Attributes:
        tokens: compared, over greedy and sampled texts and all ways of drafting.
        differing: of them, those that were not as they should be.
        accepted: tree nodes that were accepted on the way.
        max_error: largest difference of a logit from transformers', in float32.
        refusal: why the family is not served; empty for one that is.
    """

    family: str
    tokens: int = 0
    differing: int = 0
    accepted: int = 0
    max_error: float = 0.0
    refusal: str = ""

    def is_good(self, expected_refusals: Mapping[str, str]) -> bool:
        """All that was compared is equal; what was refused was to be, for that reason."""
        if self.family in expected_refusals:
            return expected_refusals[self.family] in self.refusal
        return not self.refusal and not self.differing and self.max_error < MOST_ERROR


def check_family(family: str, draft: Path | None, effort: Effort = Effort()) -> Finding:
    """Make a tiny random model of a family and compare. Blocks for a second or so.

    Args:
        draft: folder of a model with the same vocabulary, for drafted trees; of any family.
    """
    rng = random.Random(family)
    prompts = [
        [rng.randrange(3, VOCAB) for _ in range(effort.prompt_tokens)]
        for _ in range(effort.prompts)
    ]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        save_random_model(family, Path(folder))
        return check_folder(family, Path(folder), draft, prompts, effort.max_tokens)


def save_random_model(family: str, folder: Path) -> None:
    """Write a tiny model with random weights, the same each time."""
    import transformers

    torch.manual_seed(7)
    config = make_config(family)
    kind: Any = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        kind = transformers.AutoModelForSeq2SeqLM
    model = kind.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=_WEIGHT_STD)
    model.save_pretrained(folder)


def check_folder(
    family: str,
    folder: Path,
    draft: Path | None,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
) -> Finding:
    """Compare a model's texts and logits with transformers', in float32."""
    try:
        engine, small = _load(folder), _load(draft) if draft else None
    except TreecastError as refused:
        return Finding(family, refusal=str(refused))
    peer = _Peer(folder)
    tokens = differing = accepted = 0
    error = 0.0
    for prompt in prompts:
        for expected, done in _texts(engine, small, peer, prompt, max_tokens):
            tokens += len(expected)
            differing += sum(a != b for a, b in zip(expected, done[0], strict=True))
            accepted += done[1]
        error = max(error, _tree_error(engine, peer, [*prompt, *expected]))
    return Finding(family, tokens, differing, accepted, error)


def _load(folder: Path) -> HFEngine:
    return HFEngine.load(folder, dtype="float32", pool_tokens=_POOL_TOKENS)


class _Peer:
    """Transformers itself, with its own attention."""

    def __init__(self, folder: Path) -> None:
        import transformers

        kind: Any = transformers.AutoModelForCausalLM
        self._model = kind.from_pretrained(folder, dtype=torch.float32).eval()
        if getattr(self._model.config, "attn_logit_softcapping", None) is not None:
            # Older releases' default attention forgets the cap.
            self._model.set_attn_implementation("eager")

    def generate(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        done = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
        )
        answer: list[int] = done[0, len(prompt) :].tolist()
        return answer

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """[tokens, vocab]"""
        ids = torch.tensor([list(tokens)])
        with torch.inference_mode():
            rows: NDArray[np.float32] = (
                self._model(ids, attention_mask=torch.ones_like(ids)).logits[0].numpy()
            )
        return rows


def _texts(
    engine: HFEngine,
    small: HFEngine | None,
    peer: _Peer,
    prompt: Sequence[int],
    max_tokens: int,
) -> Iterator[tuple[list[int], tuple[list[int], int]]]:
    """Expected text, and the text that came with the nodes accepted on the way."""
    key = noise_key(len(prompt))
    # Tiny configurations may keep the end-of-sequence tokens of their family's whole vocabulary.
    eos = [token for token in engine.info.eos_token_ids if token < engine.info.vocab_size]
    bias = dict.fromkeys(eos, -1e4)

    def run(sampling: SamplingParams, drafter: Drafter | None) -> tuple[list[int], int]:
        done = generate(engine, prompt, sampling, key, drafter, max_nodes=_NODES)
        return done.tokens, done.accepted

    for temperature in (0.0, 1.0):
        sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, logit_bias=bias)
        plain = run(sampling, None)
        if temperature == 0:
            yield peer.generate(prompt, max_tokens), plain
        yield plain[0], run(sampling, RandomTrees(plain[0], engine.info.vocab_size))
        if small is not None:
            yield plain[0], run(sampling, SSMDrafter(small, BestFirst()))


def _tree_error(engine: HFEngine, peer: _Peer, text: Sequence[int]) -> float:
    """The text's second half as a branch of a random tree: its logits beside transformers'."""
    half = len(text) // 2
    sequence = engine.allocate(len(text) + 2 * half)
    engine.forward([Segment.chain(sequence, text[:half], [])])
    engine.commit(sequence, range(half))
    tokens, parents, path = _around(text[half:], engine.info.vocab_size)
    (rows,) = engine.forward([Segment(sequence, tokens, parents, path)])
    expected = peer.logits(text)[half:]
    error = max(float(np.abs(rows[i] - expected[i]).max()) for i in range(len(path)))
    engine.free(sequence)
    return error


def _around(path: Sequence[int], vocab_size: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens and parents of a random tree, and the rows of the path that it holds."""
    rng = random.Random(len(path))
    tokens: list[int] = []
    parents: list[int] = []
    rows: list[int] = []
    for token in path:
        if rng.random() < 0.5:
            parents.append(rng.randint(-1, len(tokens) - 1))
            tokens.append(rng.randrange(vocab_size))
        parents.append(rows[-1] if rows else -1)
        rows.append(len(tokens))
        tokens.append(token)
    return tokens, parents, rows


def check_all(
    families: Sequence[str],
    progress: Callable[[str], None],
    effort: Effort = Effort(),
) -> Iterator[Finding]:
    """Findings of tiny models one by one; the drafts are by a tiny GPT-2 for all of them."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as draft:
        save_random_model("gpt2", Path(draft))
        for family in families:
            progress(family)
            yield check_family(family, Path(draft), effort)
