"""Record a target's greedy answers to a prompts file, for `bench.acceptance` to replay.

python -m treecast.bench.record prompts.jsonl --out answers.jsonl.gz
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treecast.checkpoints import ensure_default_target
from treecast.decoding.local import generate
from treecast.drafting.ngram import NgramDrafter
from treecast.sampling.params import SamplingParams
from treecast.tuning.corpus import Record, append_records

from .prompts import read_prompts


def record(
    prompts: Path, folder: Path, max_tokens: int, limit: int | None = None
) -> Iterator[Record]:
    """Answer prompt after prompt; blocks. Lookup makes it quicker and changes nothing.

    Raises:
        CorpusError: the prompts cannot be read.
    """
    from transformers import AutoTokenizer

    from treecast.engine.hf import HFEngine

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    engine = HFEngine.load(folder, numerics="exact")
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    for prompt in read_prompts(prompts, limit):
        turn = [{"role": "user", "content": prompt.text}]
        asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        said = generate(engine, asked, sampling, 0, NgramDrafter(), chunk_tokens=256)
        yield Record(tuple(asked), tuple(said.tokens))


def main() -> None:
    """Append answers as they come."""
    parser = argparse.ArgumentParser(description="Record a target's greedy answers.")
    parser.add_argument("prompts", type=Path, help='{"id", "category", "turns"} a line')
    parser.add_argument("--out", type=Path, required=True, help="corpus to append to")
    parser.add_argument("--model", type=Path, help="target's folder; default: the default target")
    parser.add_argument("--limit", type=int, help="prompts, evenly spread; default: all")
    parser.add_argument("--max-tokens", type=int, default=128)
    arguments = parser.parse_args()
    folder = arguments.model or ensure_default_target()
    for each in record(arguments.prompts, folder, arguments.max_tokens, arguments.limit):
        append_records(arguments.out, [each])


if __name__ == "__main__":
    main()
