"""What a request costs Redis, counted by a real Valkey; docs/scaling.md has the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from redis import Redis

from treecast import AsyncClient, SamplingParams
from treecast.services.router.keys import entry_of

from .toy_mesh import toy_mesh

REQUESTS = 40
GREEDY = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)

WITHOUT_SESSION = {"get": 3, "set": 3}
"""Three beginnings of a prompt of 200 tokens: asked for, and noted."""

FIRST_TURN = {"getex": 2, "get": 3 + 1, "eval": 1, "time": 1, "set": 3 + 1}
"""The lease is looked for and renewed at the end; the script of a claim asks, and sets."""

LATER_TURN = {"getex": 2, "set": 3}
"""Nobody else is asked where the session's holder is known."""

QUOTA = {"eval": 1, "time": 1, "hmget": 1, "hset": 1, "pexpire": 1}
"""Of each bucket: one take of a request, one of its tokens, one to give back what it left."""


_FROM_OUTSIDE = ("get", "set", "getex", "eval")
"""A script's time holds that of the commands that it calls: their part here counts twice."""


def counts(redis: Redis) -> dict[str, int]:
    """Commands by name, those of scripts included."""
    stats: Any = redis.info("commandstats")
    return {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in stats.items()}


def per_request(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """Whole calls of a request; the registry's own, a few a second, are too few to make one."""
    found = {name: (after[name] - before.get(name, 0)) // REQUESTS for name in after}
    return {name: calls for name, calls in found.items() if calls}


@pytest.mark.parametrize(
    ("session", "expected"),
    [
        (lambda number: None, WITHOUT_SESSION),
        (lambda number: f"session-{number}", FIRST_TURN),
        (lambda number: "the-same", LATER_TURN),
    ],
    ids=["without a session", "first turn", "later turn"],
)
async def test_commands_of_a_request_are_those_of_the_table(
    empty_redis: str, session: Callable[[int], str | None], expected: dict[str, int]
) -> None:
    found = await spent(empty_redis, session, 200)
    assert found == expected


async def test_short_prompt_without_a_session_costs_nothing(empty_redis: str) -> None:
    assert await spent(empty_redis, lambda number: None, 20) == {}


@pytest.mark.parametrize(("left", "scripts"), [(0, 2), (1, 3)])
async def test_quotas_cost_a_script_for_each_bucket_and_one_to_give_back(
    empty_redis: str, left: int, scripts: int
) -> None:
    limits = {"requests_per_minute": 10_000, "tokens_per_minute": 1_000_000}
    router = {"api_keys": entry_of("tc_key", "tenant", limits)}
    sampling = replace(GREEDY, stop_token_ids=tuple(range(left * 60, 97))[:64] if left else ())
    found = await spent(empty_redis, lambda number: None, 20, sampling, **router)
    assert found == {name: scripts * calls for name, calls in QUOTA.items()}


async def spent(
    redis_url: str,
    session: Callable[[int], str | None],
    num_tokens: int,
    sampling: SamplingParams = GREEDY,
    **router: Any,
) -> dict[str, int]:
    """Commands of each of many requests, after one that is not counted; prints Redis' own time."""
    prompt = [number % 97 for number in range(num_tokens)]
    async with (
        toy_mesh(redis_url=redis_url, **router) as mesh,
        AsyncClient(mesh.address, api_key="tc_key" if router else None) as client,
    ):
        await client.generate(prompt, sampling, session_id=session(-1)).result()
        with Redis.from_url(redis_url) as redis:
            before = counts(redis)
            for number in range(REQUESTS):
                await client.generate(prompt, sampling, session_id=session(number)).result()
            found = per_request(before, counts(redis))
            stats: Any = redis.info("commandstats")
    times = {name: stats[f"cmdstat_{name}"]["usec_per_call"] for name in found}
    total_us = sum(times[name] * calls for name, calls in found.items() if name in _FROM_OUTSIDE)
    print(f"{total_us:.0f} us of Redis' time for a request: {found}")  # noqa: T201
    return found
