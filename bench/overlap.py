"""How much of drafting hides behind verification, and what the stream between them carries.

`python -m treecast.bench.overlap` starts two meshes with a draft model that has a core of its own.
In one it drafts when it is asked; in the other it runs ahead, and goes on with its tree while the
verifier verifies. Both answer the same prompts in turn. With the planner `goodput` a draft ends
where it no longer pays, so a tree that is there already is not grown; with `full` it always takes
all its passes, and trees get deeper instead of sooner. Bytes are counted by a TCP proxy between the
two, HTTP/2 and heartbeats included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

from treecast.checkpoints import default_cache_dir
from treecast.client import Result, SamplingParams
from treecast.services.local import MeshSettings
from treecast.services.local.logs import new_log_dir

from .chaos.load import Work, toy_works
from .chaos.mesh import ChaosMesh, ChaosSettings
from .compare import Spread
from .machine import describe_machine
from .mesh_phases import phase_sums
from .prompts import DEFAULT_PROMPTS, read_prompts
from .scrape import scrape

WAYS = {"when asked": True, "ahead": False}
"""Of drafting, with the speculator's setting `shares_cores`."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What is the same for both.

    Attributes:
        num_nodes: of a tree at most.
        concurrency: sessions at once.
    """

    num_nodes: int = 64
    concurrency: int = 1
    rounds: int = 3


@dataclass(frozen=True, slots=True)
class Reading:
    """Totals of a mesh so far; seconds and bytes.

    Attributes:
        passes: of the LLM, whatever the number of sessions in each.
        wait_s: that passes waited for trees.
        draft_s: that the draft model computed what it was asked for.
        trees, nodes: that the speculator sent.
        hits, misses: commits that it had and had not foreseen.
    """

    at_s: float
    passes: float
    wait_s: float
    draft_s: float
    trees: float
    nodes: float
    hits: float
    misses: float
    to_speculator: int
    from_speculator: int


@dataclass(frozen=True, slots=True)
class Lap:
    """All prompts answered once by one mesh.

    Attributes:
        steps: summed over requests; those in one pass of the LLM count each.
        step_ms, wait_ms, draft_ms: of a pass of the LLM.
        nodes: of a tree that was sent.
        hit_rate: share of commits that were foreseen; None where nothing runs ahead.
        wire_bytes: both ways, for a step of one session.
    """

    way: str
    steps: int
    tokens: int
    step_ms: float
    wait_ms: float
    draft_ms: float
    nodes: float
    hit_rate: float | None
    wire_bytes: float
    token_ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Standing:
    """One way of drafting over all laps."""

    way: str
    tokens_per_step: float
    step_ms: Spread
    wait_ms: Spread
    draft_ms: Spread
    nodes: Spread
    hit_rate: float | None
    wire_bytes: Spread

    @classmethod
    def of(cls, laps: Sequence[Lap]) -> Standing:
        def spread(name: str) -> Spread:
            return Spread.of([getattr(lap, name) for lap in laps])

        hits = [lap.hit_rate for lap in laps if lap.hit_rate is not None]
        return cls(
            laps[0].way,
            sum(lap.tokens for lap in laps) / sum(lap.steps for lap in laps),
            spread("step_ms"),
            spread("wait_ms"),
            spread("draft_ms"),
            spread("nodes"),
            sum(hits) / len(hits) if hits else None,
            spread("wire_bytes"),
        )

    def __str__(self) -> str:
        foreseen = "" if self.hit_rate is None else f", {self.hit_rate:.0%} of commits foreseen"
        return (
            f"{self.way:10} {self.step_ms.median:6.1f} ms a step, "
            f"{self.wait_ms.median:.1f} ({self.wait_ms.lower:.1f}-{self.wait_ms.upper:.1f}) of it "
            f"waiting for trees, which took {self.draft_ms.median:.1f}; "
            f"{self.tokens_per_step:.2f} tokens per step{foreseen}; "
            f"trees of {self.nodes.median:.0f} nodes; "
            f"{self.wire_bytes.median:.0f} bytes on the wire per session and step"
        )


@dataclass(frozen=True, slots=True)
class Overlap:
    """Both ways.

    Attributes:
        hidden: share of the waiting that running ahead took away.
        same: whether all laps gave the same tokens.
    """

    standings: tuple[Standing, ...]
    hidden: float
    same: bool


def overlap_settings(
    mesh: MeshSettings, log_dir: Path, toy_step_s: float, way: str
) -> ChaosSettings:
    """One process of each role; `mesh` has its engine and models."""
    flags = {"shares_cores": WAYS[way], **mesh.speculator_flags}
    alone = replace(mesh, speculators=("ssm",), speculator_flags=flags)
    folder = log_dir / way.replace(" ", "-")
    folder.mkdir(parents=True)
    return ChaosSettings(alone, folder, num_routers=1, toy_step_s=toy_step_s)


async def compare(
    settings: Sequence[ChaosSettings], works: Sequence[Work], terms: Terms
) -> Overlap:
    """Start a mesh for each way of drafting, and let them answer in turn."""
    async with AsyncExitStack() as stack:
        meshes = {
            way: await stack.enter_async_context(ChaosMesh(each))
            for way, each in zip(WAYS, settings, strict=True)
        }
        for mesh in meshes.values():
            await _answer(mesh, works[:1], terms)  # caches fill, uncounted
        laps = [
            await _lap(way, mesh, works, terms)
            for _ in range(terms.rounds)
            for way, mesh in meshes.items()
        ]
    standings = tuple(Standing.of([lap for lap in laps if lap.way == way]) for way in WAYS)
    asked, ahead = standings
    hidden = 1.0 - ahead.wait_ms.median / asked.wait_ms.median if asked.wait_ms.median else 0.0
    same = all(one.token_ids == other.token_ids for one, other in pairwise(laps))
    return Overlap(standings, hidden, same)


async def _lap(way: str, mesh: ChaosMesh, works: Sequence[Work], terms: Terms) -> Lap:
    before = await asyncio.to_thread(_read, mesh)
    results = await _answer(mesh, works, terms)
    after = await asyncio.to_thread(_read, mesh)
    steps = sum(result.usage.steps for result in results)
    passes = after.passes - before.passes
    hits, misses = after.hits - before.hits, after.misses - before.misses
    sent = after.to_speculator - before.to_speculator
    came = after.from_speculator - before.from_speculator
    return Lap(
        way,
        steps,
        sum(len(result.token_ids) for result in results),
        1000 * (after.at_s - before.at_s) / passes,
        1000 * (after.wait_s - before.wait_s) / passes,
        1000 * (after.draft_s - before.draft_s) / passes,
        (after.nodes - before.nodes) / max(1.0, after.trees - before.trees),
        hits / (hits + misses) if hits + misses else None,
        (sent + came) / steps,
        tuple(result.token_ids for result in results),
    )


async def _answer(mesh: ChaosMesh, works: Sequence[Work], terms: Terms) -> list[Result]:
    seats = asyncio.Semaphore(terms.concurrency)
    async with mesh.client(timeout_s=600.0) as client:

        async def ask(work: Work) -> Result:
            async with seats:
                stream = client.generate(work.prompt, work.sampling, max_nodes=terms.num_nodes)
                return await stream.result()

        return await asyncio.gather(*map(ask, works))


def _read(mesh: ChaosMesh) -> Reading:
    phases = phase_sums(mesh.processes["verifier-0"])
    totals: Counter[str] = Counter()
    for sample in scrape(mesh.processes["ssm"]):
        totals[f"{sample.name} {sample.labels.get('outcome', '')}".strip()] += sample.value  # type: ignore[assignment]  # floats
    link = mesh.links["ssm"]
    return Reading(
        time.perf_counter(),
        phases["forward"].count,
        phases["collect"].seconds,
        totals["treecast_speculator_draft_seconds_sum"],
        totals["treecast_speculator_trees_total"],
        totals["treecast_speculator_nodes_total"],
        totals["treecast_speculator_run_ahead_total hit"],
        totals["treecast_speculator_run_ahead_total miss"],
        link.there.num_bytes,
        link.back.num_bytes,
    )


def _works(engine: str, prompts: Path, limit: int, tokens: int) -> list[Work]:
    if engine == "toy":
        return toy_works(limit, tokens)
    sampling = SamplingParams(temperature=0, max_tokens=tokens)
    return [Work(prompt.id, prompt.chat, sampling) for prompt in read_prompts(prompts, limit)]


def main() -> None:
    """Print one line per way of drafting, or JSON."""
    parser = argparse.ArgumentParser(prog="treecast.bench.overlap", description=__doc__)
    parser.add_argument("--engine", choices=("hf", "toy"), default="hf", help="hf: SmolLM2")
    parser.add_argument("--prompts", type=Path, default=DEFAULT_PROMPTS)
    parser.add_argument("--limit", type=int, default=8, help="number of prompts")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--nodes", type=int, default=64, help="of a tree")
    parser.add_argument("--planner", choices=("goodput", "full"), default="goodput")
    parser.add_argument("--concurrency", type=int, default=1, help="sessions at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=20.0, help="toy engine: of a pass")
    parser.add_argument("--draft-ms", type=float, default=2.0, help="toy engine: of a draft's pass")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    log_dir = new_log_dir(default_cache_dir() / "logs")
    mesh = MeshSettings(
        engine=options.engine,
        planner=options.planner,
        torch_threads=1,
        verifier_flags={"max_nodes": options.nodes},
        speculator_flags={"toy_step_s": options.draft_ms / 1000},
    )
    settings = [overlap_settings(mesh, log_dir, options.step_ms / 1000, way) for way in WAYS]
    works = _works(options.engine, options.prompts, options.limit, options.tokens)
    terms = Terms(options.nodes, options.concurrency, options.rounds)
    found = asyncio.run(compare(settings, works, terms))
    if options.json:
        print(json.dumps({"machine": describe_machine(), **asdict(found)}))
        return
    for standing in found.standings:
        print(standing)
    print(
        f"hidden by running ahead: {found.hidden:.0%}; same tokens: {'yes' if found.same else 'no'}"
    )


if __name__ == "__main__":
    main()
