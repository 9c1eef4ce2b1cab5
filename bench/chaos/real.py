"""The default model's requests: few, and slower than the toy's."""

from __future__ import annotations

from treecast.bench.prompts import DEFAULT_PROMPTS, read_prompts
from treecast.client import SamplingParams

from .load import Work


def real_works(num_tokens: int) -> list[Work]:
    """The prompts of the demo, greedy and sampled in turn."""
    prompts = read_prompts(DEFAULT_PROMPTS)
    return [
        Work(
            prompt.id,
            prompt.chat,
            SamplingParams(temperature=0.8 * (at % 2), seed=at, max_tokens=num_tokens),
        )
        for at, prompt in enumerate(prompts)
    ]
