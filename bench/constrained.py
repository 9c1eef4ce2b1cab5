"""Generations under a JSON schema: all valid, and the same with speculation as without.

`python -m treecast.bench.constrained` asks a whole mesh with the default model and drafts, several
requests at once: each prompt sampled with a seed of its own (every fourth greedy), plainly and
through trees; what comes out is validated with an implementation of JSON Schema that had no part in
making it. The same without the mask is the control: a small model left alone writes little JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import jsonschema
from rich.console import Console

from treecast.bench.prompts import user_turn
from treecast.client import AsyncClient, Result, SamplingParams
from treecast.services.local.mesh import LocalMesh
from treecast.services.local.settings import MeshSettings

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "animal": {"type": "string", "maxLength": 12},
        "legs": {"type": "integer", "minimum": 0, "maximum": 99},
        "colors": {"type": "array", "items": {"enum": ["red", "black", "white"]}, "maxItems": 2},
    },
    "required": ["animal", "legs", "colors"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},  # a small model may indent without end
}
_SUBJECTS = ("a cat", "a spider", "a bird you like", "some animal", "a fish")
_AT_ONCE = 8
_MAX_TOKENS = 96


@dataclass(slots=True)
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

    def add(self, plain: Result, drafted: Result) -> None:
        """Count one prompt's two answers."""
        self.generations += 1
        self.valid += is_valid(drafted.text)
        self.identical += plain.token_ids == drafted.token_ids
        self.tokens += len(drafted.token_ids)
        self.plain_steps += plain.usage.steps
        self.steps += drafted.usage.steps


async def measure(
    client: AsyncClient, generations: int, unmasked: int, progress: Callable[[str], None]
) -> Tally:
    """Generate, compare and validate; the first `unmasked` seeds again without a mask."""
    tally, turns = Tally(), asyncio.Semaphore(_AT_ONCE)

    async def answer(seed: int, max_nodes: int | None = None, masked: bool = True) -> Result:
        sampling = SamplingParams(
            temperature=1.0 if seed % 4 else 0.0,
            seed=seed,
            max_tokens=_MAX_TOKENS,
            json_schema=SCHEMA,
        )
        if not masked:
            sampling = replace(sampling, json_schema="", temperature=1.0)
        subject = _SUBJECTS[seed % len(_SUBJECTS)]
        chat = user_turn(f"Describe {subject} as JSON.")
        async with turns:
            return await client.generate(chat, sampling, max_nodes=max_nodes).result()

    async def compare(seed: int) -> None:
        tally.add(await answer(seed, max_nodes=0), await answer(seed))
        progress(
            f"{tally.generations} of {generations}: "
            f"{tally.valid} valid, {tally.identical} identical"
        )

    async def leave_free(seed: int) -> None:
        tally.unmasked_valid += is_valid((await answer(seed, masked=False)).text)
        tally.unmasked += 1

    await asyncio.gather(*map(compare, range(generations)), *map(leave_free, range(unmasked)))
    return tally


def is_valid(text: str) -> bool:
    """Whether a text is JSON of the schema."""
    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


async def _measure_at(router: str, generations: int, unmasked: int) -> Tally:
    console = Console(stderr=True)
    with console.status("generating") as shown:
        show = shown.update if console.is_terminal else console.print
        async with AsyncClient(router) as client:
            return await measure(client, generations, unmasked, show)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--unmasked", type=int, default=20, help="control without the mask")
    asked = parser.parse_args()
    with LocalMesh(MeshSettings(planner="full")) as mesh:
        tally = asyncio.run(_measure_at(mesh.router_address, asked.generations, asked.unmasked))
    print(json.dumps(asdict(tally)))


if __name__ == "__main__":
    main()
