"""Several routers, real verifiers, a real Redis: every turn goes where its KV cache is."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from treecast import AsyncClient, SamplingParams
from treecast.client.results import Usage
from treecast.engine.toy import ToyEngine
from treecast.services.router.placement import PlacedBy
from treecast.services.router.server import Router
from treecast.services.router.settings import RouterSettings
from treecast.text.tokenizer import TokenizerFiles

from ..byte_tokenizer import SPECIAL_TOKENS, TEMPLATE, byte_tokenizer
from .router.rig import sample
from .verifier_rig import Rig, verifier_rig

VOCAB = 258
GREEDY = SamplingParams(temperature=0, max_tokens=8)
FILES = TokenizerFiles(byte_tokenizer().to_str().encode(), TEMPLATE, SPECIAL_TOKENS)
NAMES = itertools.count()


@asynccontextmanager
async def fleet(num_verifiers: int) -> AsyncIterator[list[Rig]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                verifier_rig(ToyEngine(vocab_size=VOCAB), FILES, f"verifier-{next(NAMES)}")
            )
            for _ in range(num_verifiers)
        ]


@asynccontextmanager
async def routing(rigs: Sequence[Rig], redis_url: str | None) -> AsyncIterator[Router]:
    settings = RouterSettings(
        verifiers=tuple(rig.address for rig in rigs), redis_url=redis_url, metrics_listen=None
    )
    async with Router(settings, f"router-{next(NAMES)}") as router:
        assert await router.fleet.until(
            lambda: len(router.fleet.candidates()) == len(rigs) or None, 10
        )
        yield router


async def ask(address: str, prompt: list[int], session_id: str | None) -> tuple[list[int], Usage]:
    async with AsyncClient(address) as client:
        result = await client.generate(prompt, GREEDY, session_id=session_id).result()
    return list(result.token_ids), result.usage


def placed(routers: Sequence[Router], by: PlacedBy) -> float:
    return sum(sample(r.metrics.registry, "placements_total", by=by.value) for r in routers)


async def test_turns_find_their_kv_when_any_router_takes_them(empty_redis: str) -> None:
    """Five turns each at random routers: what is computed is what is new, and nothing else."""
    draw = random.Random(0)
    async with fleet(2) as rigs, AsyncExitStack() as stack:
        routers = [await stack.enter_async_context(routing(rigs, empty_redis)) for _ in range(3)]

        async def converse(name: str) -> list[tuple[int, int]]:
            text = [draw.randrange(VOCAB) for _ in range(70)]
            found = []
            for _ in range(5):
                output, usage = await ask(draw.choice(routers).address, text, name)
                found.append((usage.cached_tokens, usage.prompt_tokens))
                text = [*text, *output, draw.randrange(VOCAB), draw.randrange(VOCAB)]
            return found

        turns = await asyncio.gather(*(converse(f"s{k}") for k in range(12)))
        assert placed(routers, PlacedBy.AFFINITY) == 12 * 4
    for conversation in turns:
        for (_, before), (cached, _) in itertools.pairwise(conversation):
            assert cached == before + 7  # all but the last output token, whose KV is not computed


@pytest.mark.parametrize("with_redis", [True, False])
async def test_a_shared_beginning_is_computed_once_when_routers_share_redis(
    empty_redis: str, with_redis: bool
) -> None:
    """One after the other, so load says nothing; without Redis nobody knows where it lies."""
    system = [k % VOCAB for k in range(200)]
    async with fleet(3) as rigs, AsyncExitStack() as stack:
        url = empty_redis if with_redis else None
        routers = [await stack.enter_async_context(routing(rigs, url)) for _ in range(2)]
        cached = [
            (await ask(routers[k % 2].address, [*system, k], f"s{k}"))[1].cached_tokens
            for k in range(6)
        ]
        by_prefix = placed(routers, PlacedBy.PREFIX)
    if with_redis:
        assert (cached, by_prefix) == ([0] + [192] * 5, 5)
    else:
        assert by_prefix == 0
