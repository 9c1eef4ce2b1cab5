"""Tokens per step of drafters on recorded greedy texts: no target is computed, so it is quick.

python -m treecast.bench.acceptance corpus.jsonl.gz --drafters ssm,ngram --max-nodes 16 24
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from treecast.drafting.base import DraftRequest
from treecast.drafting.merge import MergedDrafter
from treecast.sampling.params import SamplingParams
from treecast.services.speculator.loading import load_engines, make_drafter
from treecast.services.speculator.metrics import SpeculatorMetrics
from treecast.services.speculator.settings import SpeculatorSettings
from treecast.tree import ROOT, TokenTree
from treecast.tuning.corpus import Record, read_corpus

_HANDLE = 0


@dataclass(slots=True)
class Tally:
    """What verifying some texts would have taken.

    Attributes:
        rates: tokens per step of each text.
    """

    tokens: int = 0
    steps: int = 0
    nodes: int = 0
    draft_s: float = 0.0
    rates: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        error = np.std(self.rates) / max(1, len(self.rates) - 1) ** 0.5
        return (
            f"{np.mean(self.rates):.2f} +- {error:.2f} tokens/step over {len(self.rates)} texts, "
            f"{self.tokens / self.steps:.3f} over {self.steps} steps, "
            f"{self.nodes / self.steps:.1f} nodes/step, "
            f"{1000 * self.draft_s / self.steps:.2f} ms/draft"
        )


def replay(drafter: MergedDrafter, record: Record, max_nodes: int, tally: Tally) -> None:
    """Verify the drafter's trees against what the target is known to have said."""
    prompt, output = record.prompt_ids, record.completion_ids
    sampling = SamplingParams(temperature=0, max_tokens=len(output))
    drafter.open(_HANDLE, DraftRequest(prompt, len(prompt), sampling, noise_key=0))
    done, first_step = 0, tally.steps
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
    tally.rates.append(len(output) / (tally.steps - first_step))
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


def main() -> None:
    """Print one line for each number of nodes."""
    parser = argparse.ArgumentParser(description="Tokens per step on recorded greedy texts.")
    parser.add_argument("corpus", type=Path, help="records as bench.record or `tune` write them")
    parser.add_argument("--drafters", default="ssm,ngram", help="as of the speculator")
    parser.add_argument("--model", default="default", help="as of the speculator")
    parser.add_argument("--growth", default="best-first", help="as of the speculator")
    parser.add_argument("--max-nodes", type=int, nargs="+", default=[16])
    parser.add_argument("--records", type=int, default=50, help="how many, evenly spread")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    records = read_corpus(arguments.corpus).records
    flags = {
        "drafters": arguments.drafters,
        "growth": arguments.growth,
        "model": arguments.model,
        "torch-threads": arguments.threads,
    }
    settings = SpeculatorSettings.load([f"--{k}={v}" for k, v in flags.items()], parser.prog)
    engines = load_engines(settings)
    for max_nodes in arguments.max_nodes:
        drafter, tally = make_drafter(settings, engines, SpeculatorMetrics()), Tally()
        for record in records[:: max(1, len(records) // arguments.records)]:
            replay(drafter, record, max_nodes, tally)
        print(f"{drafter.name} {settings.growth} {max_nodes} nodes: {tally}", flush=True)


if __name__ == "__main__":
    main()
