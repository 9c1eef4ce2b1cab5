"""A mesh in simulated time, by the routers' own code: latency, affinity and queues against load.

    python -m treecast.bench.simulate --requests-per-s 2 4 6 8 --verifiers 8

What decides is what serves: queue, turns, placement, sessions with their leases, prefix hints and
the predictor of lengths are the router's own functions; leases and hints lie in memory instead of
Redis. What takes time is a verifier's steps, by a measured step curve: continuous batching, prompts
in chunks, a KV pool of pages that sessions and system prompts find again, requests that wait for
slots and pages. Each router learns of a verifier's load by its heartbeats, and of a loss after a
second of silence. Not simulated: the network, Redis, text, drafts (a tree is so many rows and so
many tokens a step, `--nodes`, `--tokens-per-step`), preemption and waiting for a sibling's prompt.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import get_args

from treecast.services.router.lengths import Predictor
from treecast.services.router.queue import QueueOrder

from .scenario import DEFAULT_CURVE, Scenario, read_curve
from .world import Outcome, simulate

_COLUMNS = {
    "served": "{0.requests}",
    "refused": "{0.refused}",
    "moved": "{0.moved}",
    "busy": "{0.busy:.2f}",
    "mean s": "{0.latency_mean_s:.2f}",
    "p50 s": "{0.latency_p50_s:.2f}",
    "p99 s": "{0.latency_p99_s:.2f}",
    "TTFT p50": "{0.first_p50_s:.3f}",
    "TTFT p99": "{0.first_p99_s:.3f}",
    "ms/token": "{0.token_mean_ms:.1f}",
    "p99": "{0.token_p99_ms:.0f}",
    "hit": "{0.hit:.2f}",
    "cached": "{0.cached:.2f}",
    "queue": "{0.queued_mean:.1f}",
    "most": "{0.queued_max}",
    "off": "{0.doublings:.2f}",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="treecast.bench.simulate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--requests-per-s", type=float, nargs="+", default=[2, 4, 6, 8], help="a row for each")
    add("--curve", type=Path, help=f"JSON of ms by rows; default: {DEFAULT_CURVE}")
    add("--queue-order", choices=get_args(QueueOrder), default="fcfs")
    add("--length-predictor", choices=get_args(Predictor), default="history")
    add("--no-affinity", dest="affinity", action="store_false", help="place by load alone")
    for name in _NUMBERS:
        kind = type(getattr(_DEFAULT, name))
        add(f"--{name.replace('_', '-')}", type=kind, default=getattr(_DEFAULT, name))
    add("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


_DEFAULT = Scenario(requests_per_s=1)
_NUMBERS = [
    one.name
    for one in fields(Scenario)
    if type(getattr(_DEFAULT, one.name)) in (int, float) and one.name != "requests_per_s"
]


def scenario_of(options: argparse.Namespace) -> Scenario:
    """All but the rate, of which there are several."""
    given = {name: getattr(options, name) for name in _NUMBERS}
    scenario = replace(
        _DEFAULT,
        queue_order=options.queue_order,
        length_predictor=options.length_predictor,
        affinity=options.affinity,
        **given,
    )
    return replace(scenario, curve_ms=read_curve(options.curve)) if options.curve else scenario


def row(requests_per_s: float, outcome: Outcome) -> str:
    cells = [text.format(outcome) for text in _COLUMNS.values()]
    return f"{requests_per_s:>7g}" + "".join(f"{cell:>9}" for cell in cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table, or JSON, a row for each rate."""
    options = parse(argv)
    scenario = scenario_of(options)
    rows = []
    if not options.json:
        print(f"{'req/s':>7}" + "".join(f"{title:>9}" for title in _COLUMNS))
    for rate in options.requests_per_s:
        one = replace(scenario, requests_per_s=rate)
        outcome = simulate(one)
        rows.append({"scenario": asdict(one), "outcome": asdict(outcome)})
        if not options.json:
            print(row(rate, outcome), flush=True)
    if options.json:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
