"""The mesh in simulated time."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from treecast.bench.simulate.__main__ import main
from treecast.bench.simulate.router import Request
from treecast.bench.simulate.scenario import Scenario, read_curve
from treecast.bench.simulate.verifier import Pages, Serving
from treecast.bench.simulate.world import World, simulate
from treecast.prefix import PAGE_TOKENS, prefix_names

SMALL = Scenario(
    requests_per_s=6, seconds=15, warm_up_s=3, verifiers=2, routers=2, slots=8, think_s=1
)
QUIET = replace(
    SMALL, requests_per_s=0.05, seconds=200, warm_up_s=0, verifiers=1, routers=1, turns=1
)


def test_same_scenario_comes_to_the_same_outcome() -> None:
    first, second, other = map(simulate, (SMALL, SMALL, replace(SMALL, seed=2)))
    assert first == second
    assert first != other


def alone(requests: list[Request]) -> list[Request]:
    """Those that met no other."""
    free_s, found = 0.0, []
    for at, one in enumerate(requests):
        assert one.ended_s is not None
        following = requests[at + 1].arrived_s if at + 1 < len(requests) else math.inf
        if one.arrived_s > free_s and one.ended_s < following:
            found.append(one)
        free_s = max(free_s, one.ended_s)
    return found


def test_lone_request_takes_what_the_curve_says() -> None:
    """Its prompt in chunks of all rows, the first token with the last of them, then a step each."""
    world = World(QUIET)
    world.run()
    requests = alone(world.requests)
    assert len(requests) >= 8
    for one in requests:
        assert one.serving is not None
        assert one.first_s is not None
        assert one.ended_s is not None
        rows = one.turn.prompt_tokens - one.serving.cached_tokens
        whole, rest = divmod(rows, QUIET.max_rows)
        prefill_s = whole * QUIET.curve(QUIET.max_rows) + (QUIET.curve(rest) if rest else 0.0)
        assert one.first_s - one.arrived_s == pytest.approx(prefill_s, rel=1e-9)
        decode_s = (one.turn.output_tokens - 1) * QUIET.curve(1)
        assert one.ended_s - one.first_s == pytest.approx(decode_s, rel=1e-9)
    assert any(one.serving and one.serving.cached_tokens for one in requests)


def test_trees_cost_rows_and_bring_tokens() -> None:
    scenario = replace(QUIET, nodes=7, tokens_per_step=2.0)
    world = World(scenario)
    world.run()
    for one in alone(world.requests):
        assert one.first_s is not None
        assert one.ended_s is not None
        steps = math.ceil((one.turn.output_tokens - 1) / 2)
        assert one.ended_s - one.first_s == pytest.approx(steps * scenario.curve(8), rel=1e-9)


def test_later_turns_go_to_their_sessions_when_there_is_room() -> None:
    outcome = simulate(SMALL)
    assert outcome.hit == 1
    assert outcome.cached > 0.5


def test_hit_rate_falls_when_affinity_is_broken() -> None:
    """The control: by load alone, only chance brings a turn to its session's KV."""
    kept, broken = simulate(SMALL), simulate(replace(SMALL, affinity=False))
    assert broken.hit == 0
    assert broken.cached < kept.cached


@pytest.mark.parametrize("affinity", [True, False])
def test_every_request_ends_once_when_verifiers_are_lost(affinity: bool) -> None:
    scenario = replace(
        SMALL, seconds=30, verifiers=3, lose_every_s=4, restart_s=3, affinity=affinity
    )
    world = World(scenario)
    outcome = world.run()
    assert outcome.moved > 0
    for one in world.requests:
        assert one.ended_s is not None
        assert one.committed == one.turn.output_tokens
    assert all(router.num_waiting == 0 for router in world.routers)


def test_queues_refuse_what_is_beyond_their_limit() -> None:
    outcome = simulate(replace(SMALL, requests_per_s=60, slots=2, queue_limit=5, turns=1))
    assert outcome.refused > 0
    assert outcome.queued_max <= 2 * 5


def test_shortest_first_lowers_the_mean_when_lengths_are_known() -> None:
    """With lengths that clients tell, and a queue in which order is all that differs."""
    crowded = replace(
        SMALL, requests_per_s=12, seconds=40, slots=2, turns=1, length_predictor="max-tokens"
    )
    fcfs, shortest = (
        simulate(replace(crowded, queue_order="fcfs")),
        simulate(replace(crowded, queue_order="shortest")),
    )
    assert shortest.requests == fcfs.requests
    assert shortest.latency_mean_s < 0.8 * fcfs.latency_mean_s


def test_pages_are_found_again_and_accounts_add_up() -> None:
    text = list(range(1000))
    names = prefix_names("t", text, PAGE_TOKENS)
    pages = Pages(total=20)
    first = Serving(names, 200, 100, lambda count: None)
    assert pages.begin(first)
    assert (first.cached_tokens, first.pages, pages.free) == (0, 5, 15)  # 301 positions
    pages.computed(first)
    assert (first.pages, pages.free) == (2, 15)  # three whole pages of the prompt are anybody's
    second = Serving(names, 300, 100, lambda count: None)
    assert pages.begin(second)
    assert (second.cached_tokens, second.pages, pages.free) == (192, 4, 11)
    big = Serving(names, 900, 99, lambda count: None)
    assert not pages.begin(big)  # 13 more pages, and 9 are in use
    pages.end(first)
    pages.end(second)
    assert pages.used == 0
    assert pages.free == 20 - len(names)


def test_curve_is_read_and_checked(tmp_path: Path) -> None:
    file = tmp_path / "curve.json"
    file.write_text('{"8": 20, "1": 10.5}')
    assert read_curve(file) == ((1, 10.5), (8, 20.0))
    file.write_text('{"0": 20}')
    with pytest.raises(ValueError, match=r"curve\.json has rows or milliseconds"):
        read_curve(file)


def test_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--requests-per-s", "4", "--seconds", "8", "--warm-up-s", "2", "--verifiers", "2"]
    assert main(flags) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "req/s"
    assert line.split()[0] == "4"
    assert main([*flags, "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["scenario"]["verifiers"] == 2
    assert row["outcome"]["requests"] > 0
