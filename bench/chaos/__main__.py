"""`python -m treecast.bench.chaos`: every fault, the table, and what is left over."""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from treecast.checkpoints import default_cache_dir
from treecast.services.local import MeshSettings
from treecast.services.local.logs import new_log_dir

from .audit import Holding, take_stock
from .campaign import NO_FAULT, run_faults
from .faults import (
    QUICK,
    ROTATION,
    Amounts,
    Fault,
    link_faults,
    process_faults,
    vanishing_clients,
)
from .fuzz import Fuzzer
from .load import Load, Work, toy_works, undisturbed
from .logs import error_events
from .mesh import ChaosMesh, ChaosSettings
from .real import real_works
from .table import PAUSE_BOUND_S, ROW_HEAD, Row, stock_table


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if nothing was lost, changed, refused or leaked."""
    options = _parse(argv)
    return asyncio.run(_run(options))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="treecast.bench.chaos", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of each, about two minutes")
    parser.add_argument("--engine", choices=("toy", "hf"), default="toy", help="hf: SmolLM2")
    parser.add_argument("--streams", type=int, default=24, help="streams at once")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each stream")
    parser.add_argument(
        "--tls",
        action="store_true",
        help="mutual TLS on every hop; certificates rotate in place of the fuzzer",
    )
    parser.add_argument("--only", default="", help="faults whose name matches this expression")
    parser.add_argument("--frames", type=int, help="of the fuzzer")
    parser.add_argument("--cancels", type=int, help="clients that vanish")
    parser.add_argument("--seed", type=int, default=1, help="of the fuzzer")
    return parser.parse_args(argv)


async def _run(options: argparse.Namespace) -> int:
    amounts = _amounts(options)
    settings = _settings(options)
    fuzzer = Fuzzer(amounts)
    _say(f"logs: {settings.log_dir}")
    async with ChaosMesh(settings) as mesh:
        works = _works(options)
        expected = await undisturbed(mesh, works)
        before = await take_stock(mesh)
        faults = _faults(mesh, works, amounts, fuzzer)
        wanted = [fault for fault in faults if re.search(options.only, fault.name)]
        rows = await _table(mesh, works, expected, options.streams, wanted)
        after = await take_stock(mesh)
    print("\n" + stock_table(before, after))
    _print_fuzz(fuzzer)
    return _verdict(rows, after, error_events(settings.log_dir))


def _amounts(options: argparse.Namespace) -> Amounts:
    base = QUICK if options.quick else Amounts()
    return replace(
        base,
        seed=options.seed,
        num_frames=options.frames or base.num_frames,
        num_cancels=options.cancels or base.num_cancels,
    )


def _print_fuzz(fuzzer: Fuzzer) -> None:
    for what, counts in (("sent", fuzzer.sent), ("ended with", fuzzer.answers)):
        if counts:
            print(f"\nfuzzer {what}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()))


def _verdict(rows: Sequence[Row], after: Mapping[str, Holding], errors: Counter[str]) -> int:
    held = sum(one.held for one in after.values())
    late = [row.fault for row in rows if row.p99_pause_s > PAUSE_BOUND_S]
    print(f"\nheld when quiet: {held}; p99 pause above {PAUSE_BOUND_S:g} s: {late or 'none'}")
    print(f"errors in the services' logs: {dict(errors) or 'none'}")
    return 0 if all(row.holds for row in rows) and not held and not errors else 1


def _settings(options: argparse.Namespace) -> ChaosSettings:
    log_dir: Path = new_log_dir(default_cache_dir() / "logs")
    mesh = MeshSettings(
        engine=options.engine, num_verifiers=2, torch_threads=1, log_dir=log_dir, tls=options.tls
    )
    return ChaosSettings(mesh, log_dir, strangers=not options.tls)


def _works(options: argparse.Namespace) -> list[Work]:
    if options.engine == "toy":
        return toy_works(16, options.tokens)
    return real_works(options.tokens)


def _faults(
    mesh: ChaosMesh, works: Sequence[Work], amounts: Amounts, fuzzer: Fuzzer
) -> list[Fault]:
    return [
        Fault(NO_FAULT, lambda mesh: asyncio.sleep(amounts.hold_s)),
        *process_faults(mesh, amounts),
        *link_faults(mesh, amounts),
        vanishing_clients(works, amounts),
        ROTATION if mesh.certificates else fuzzer.fault,
    ]


async def _table(
    mesh: ChaosMesh,
    works: Sequence[Work],
    expected: dict[str, tuple[int, ...]],
    num_streams: int,
    faults: Sequence[Fault],
) -> list[Row]:
    rows = []
    print(ROW_HEAD, flush=True)
    async with Load(mesh, works, expected, num_streams) as load:
        async for row in run_faults(mesh, load, faults, _say):
            rows.append(row)
            print(row, flush=True)
            for why, count in row.whys.items():
                _say(f"  {count} x {why}")
    counts = ", ".join(f"{count:,} {kind.value}" for kind, count in load.counts.items())
    print(f"\nstreams in all: {counts}")
    return rows


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
