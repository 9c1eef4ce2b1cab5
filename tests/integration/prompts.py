"""Prompts for tests with the real model: short, unlike each other."""

from __future__ import annotations

import json
import os
from pathlib import Path

SOME = (
    "List five fruits and, for each, its colour.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Rewrite in the past tense: The cat sits on the mat. The dog runs after the ball.",
    "Write a Python function that returns the n-th Fibonacci number, then explain it.",
)


def spec_bench(count: int) -> tuple[str, ...]:
    """First turns of a Spec-Bench file named by TREECAST_TEST_PROMPTS, spread over categories.

    Without such a file, `SOME` in several wordings, so that the test says the same of less varied
    text.
    """
    path = os.environ.get("TREECAST_TEST_PROMPTS")
    if not path:
        starts = ("", "Please answer briefly. ", "Explain step by step. ", "You are an expert. ")
        return tuple(start + prompt for start in starts for prompt in SOME)[:count]
    lines = Path(path).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    step = max(1, len(rows) // count)
    return tuple(row["turns"][0] for row in rows[::step])[:count]
