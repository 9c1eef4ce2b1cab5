"""Tokens per step of drafters on recorded greedy texts: no target is computed, so it is quick.

python -m bench.acceptance corpus.jsonl.gz --drafter ngram --drafter ssm --model draft/
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from treecast.checkpoints import ensure_default_draft
from treecast.drafting.base import Drafter, DraftRequest
from treecast.drafting.growth import parse_growth
from treecast.drafting.merge import MergedDrafter
from treecast.drafting.ngram import NgramDrafter
from treecast.drafting.ssm import SSMDrafter
from treecast.sampling.params import SamplingParams
from treecast.tree import ROOT, TokenTree
from treecast.tuning.corpus import Record, read_corpus

_HANDLE = 0


@dataclass(slots=True)
class Tally:
    """What verifying some texts would have taken."""

    tokens: int = 0
    steps: int = 0
    nodes: int = 0
    draft_s: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.tokens / self.steps:.3f} tokens/step, {self.nodes / self.steps:.1f} nodes/step,"
            f" {1000 * self.draft_s / self.steps:.2f} ms/draft, {self.steps} steps"
        )


def replay(drafter: MergedDrafter, record: Record, max_nodes: int, tally: Tally) -> None:
    """Verify the drafter's trees against what the target is known to have said."""
    prompt, output = record.prompt_ids, record.completion_ids
    sampling = SamplingParams(temperature=0, max_tokens=len(output))
    drafter.open(_HANDLE, DraftRequest(prompt, len(prompt), sampling, noise_key=0))
    done = 0
    while done < len(output):
        began = time.perf_counter()
        tree = _draft(drafter, max_nodes)
        tally.draft_s += time.perf_counter() - began
        committed = output[done : done + _accepted(tree, output[done:-1]) + 1]
        drafter.commit(_HANDLE, committed)
        done += len(committed)
        tally.steps += 1
        tally.nodes += len(tree)
    tally.tokens += len(output)
    drafter.close(_HANDLE)


def _draft(drafter: MergedDrafter, max_nodes: int) -> TokenTree:
    trees = drafter.draft({_HANDLE: max_nodes})
    while drafter.is_behind(_HANDLE):
        trees = drafter.draft({_HANDLE: max_nodes})
    return trees[_HANDLE]


def _accepted(tree: TokenTree, output: Sequence[int]) -> int:
    """How many of the next tokens the tree holds, as a path."""
    node = ROOT
    for count, token in enumerate(output):
        found = tree.child(node, token)
        if found is None:
            return count
        node = found
    return len(output)


def _drafters(arguments: argparse.Namespace) -> MergedDrafter:
    drafters: list[Drafter] = []
    for kind in arguments.drafter:
        if kind == "ngram":
            drafters.append(NgramDrafter())
            continue
        from treecast.engine.hf import HFEngine

        engine = HFEngine.load(arguments.model or ensure_default_draft(), numerics="fast")
        drafters.append(SSMDrafter(engine, parse_growth(arguments.growth)))
    return MergedDrafter(drafters)


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description="Tokens per step on recorded greedy texts.")
    parser.add_argument("corpus", type=Path, help="records as `treecast tune` writes them")
    parser.add_argument("--drafter", choices=["ssm", "ngram"], action="append", required=True)
    parser.add_argument("--model", type=Path, help="draft model's folder; default: the one shipped")
    parser.add_argument("--growth", default="best-first")
    parser.add_argument("--max-nodes", type=int, default=16)
    parser.add_argument("--records", type=int, default=50, help="how many, evenly spread")
    arguments = parser.parse_args()
    records = read_corpus(arguments.corpus).records
    drafter, tally = _drafters(arguments), Tally()
    for record in records[:: max(1, len(records) // arguments.records)]:
        replay(drafter, record, arguments.max_nodes, tally)
    print(f"{drafter.name}: {tally}")


if __name__ == "__main__":
    main()
