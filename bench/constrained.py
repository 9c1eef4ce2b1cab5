"""Generations under a JSON schema: all valid, and the same with speculation as without.

`python -m treecast.bench.constrained` answers prompts with the default model and draft, sampled
with a seed each, plainly and through drafted trees, and validates what comes out with an
implementation of JSON Schema that had no part in making it. The same without the mask is the
control: a small model left alone writes little JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import jsonschema
from rich.console import Console
from tokenizers import Tokenizer

from treecast.checkpoints import ensure_default_draft, ensure_default_target
from treecast.decoding.local import generate
from treecast.drafting.growth import BestFirst
from treecast.drafting.ssm import SSMDrafter
from treecast.engine.hf import HFEngine
from treecast.sampling.grammar import Grammars
from treecast.sampling.noise import noise_key
from treecast.sampling.params import SamplingParams

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "animal": {"type": "string", "maxLength": 12},
        "legs": {"type": "integer", "minimum": 0, "maximum": 99},
        "colors": {"type": "array", "items": {"enum": ["red", "black", "white"]}, "maxItems": 2},
    },
    "required": ["animal", "legs", "colors"],
    "additionalProperties": False,
}
_PROMPT = "<|im_start|>user\nDescribe {} as JSON.<|im_end|>\n<|im_start|>assistant\n"
_SUBJECTS = ("a cat", "a spider", "a bird you like", "some animal", "a fish")
_NODES = 8


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of a number of generations.

    Attributes:
        valid: those that are JSON of the schema.
        identical: those whose tokens are the same with speculation and without.
        plain_steps, steps: passes without and with speculation.
        unmasked_valid: of `unmasked` generations without the mask.
    """

    generations: int = 0
    valid: int = 0
    identical: int = 0
    tokens: int = 0
    plain_steps: int = 0
    steps: int = 0
    unmasked: int = 0
    unmasked_valid: int = 0


class _Models:
    """The default model, its draft and its grammars."""

    def __init__(self) -> None:
        folder = ensure_default_target()
        self.engine = HFEngine.load(folder)
        self.draft = HFEngine.load(ensure_default_draft())
        definition = (folder / "tokenizer.json").read_bytes()
        self.tokenizer = Tokenizer.from_str(definition.decode())
        info = self.engine.info
        self.grammars = Grammars.for_model(definition, info.eos_token_ids, info.vocab_size)

    def text(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens)
        return text


def measure(
    generations: int, unmasked: int, progress: Callable[[str], None], max_tokens: int = 60
) -> Tally:
    """Generate, compare and validate; the last `unmasked` seeds again without a mask. Blocks."""
    models, tally = _Models(), Tally()
    for seed in range(generations):
        progress(f"{seed} of {generations}: {tally.valid} valid, {tally.identical} identical")
        prompt = models.tokenizer.encode(_PROMPT.format(_SUBJECTS[seed % len(_SUBJECTS)])).ids
        sampling = SamplingParams(
            temperature=1.0 if seed % 4 else 0.0, max_tokens=max_tokens, json_schema=SCHEMA
        )
        tally = _count(tally, models, prompt, sampling, noise_key(seed))
        if seed >= generations - unmasked:
            free = replace(sampling, json_schema="", temperature=1.0)
            done = generate(models.engine, prompt, free, noise_key(seed))
            tally = replace(
                tally,
                unmasked=tally.unmasked + 1,
                unmasked_valid=tally.unmasked_valid + is_valid(models.text(done.tokens)),
            )
    return tally


def _count(
    tally: Tally, models: _Models, prompt: list[int], sampling: SamplingParams, key: int
) -> Tally:
    plain, drafted = (
        generate(models.engine, prompt, sampling, key, drafter, _NODES, grammars=models.grammars)
        for drafter in (None, SSMDrafter(models.draft, BestFirst()))
    )
    return replace(
        tally,
        generations=tally.generations + 1,
        valid=tally.valid + is_valid(models.text(drafted.tokens)),
        identical=tally.identical + (plain.tokens == drafted.tokens),
        tokens=tally.tokens + len(drafted.tokens),
        plain_steps=tally.plain_steps + plain.steps,
        steps=tally.steps + drafted.steps,
    )


def is_valid(text: str) -> bool:
    """Whether a text is JSON of the schema."""
    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--unmasked", type=int, default=20, help="control without the mask")
    asked = parser.parse_args()
    console = Console(stderr=True)
    with console.status("loading") as shown:
        show = shown.update if console.is_terminal else console.print
        tally = measure(asked.generations, asked.unmasked, show)
    print(json.dumps(asdict(tally)))


if __name__ == "__main__":
    main()
