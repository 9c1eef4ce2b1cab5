"""Callers of every kind that the dashboards tell apart, for as long as it is asked for."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from contextlib import suppress

from treecast.client import AsyncClient, Prompt
from treecast.errors import TreecastError
from treecast.sampling.params import SamplingParams

_PRIORITIES = (-5, 0, 5)
_GRACE_S = 30.0
_LEFT_AFTER = 11
"""One request in so many is given up by its caller, another one asks for what nobody serves."""


async def run_traffic(
    address: str, prompts: Sequence[Prompt], streams: int, seconds: float, max_tokens: int
) -> None:
    """Keep `streams` requests going: greedy and sampled, of all priorities, in sessions and not.

    Errors are what the metrics are for, so they end a request and nothing else; what runs when the
    time is up has some more to end in.
    """
    async with AsyncClient(address) as client:
        until_s = asyncio.get_running_loop().time() + seconds
        callers = (_call(client, prompts, n, until_s, max_tokens) for n in range(streams))
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*callers), seconds + _GRACE_S)


async def _call(
    client: AsyncClient, prompts: Sequence[Prompt], caller: int, until_s: float, max_tokens: int
) -> None:
    loop = asyncio.get_running_loop()
    for turn in itertools.count(1):
        if loop.time() >= until_s:
            return
        sampling = SamplingParams(
            temperature=0.8 * (turn % 2), seed=turn, max_tokens=max_tokens // (1 + caller % 3)
        )
        stream = client.generate(
            prompts[(caller + turn) % len(prompts)],
            sampling,
            session_id=f"caller-{caller}-{turn // 4}" if turn % 3 else None,
            priority=_PRIORITIES[caller % len(_PRIORITIES)],
            model="no-such-model" if turn % _LEFT_AFTER == 0 else None,
        )
        with suppress(TreecastError):
            async with stream:
                async for _ in stream:
                    if (turn + caller) % _LEFT_AFTER == 1:
                        break
