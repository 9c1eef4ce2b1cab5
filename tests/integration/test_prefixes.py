"""A prompt's beginning is computed once for all sessions of a tenant, and for no other."""

from __future__ import annotations

import asyncio

from treecast.engine.toy import ToyEngine
from treecast.sampling.params import SamplingParams
from treecast.wire.frames import SessionKey

from .verifier_rig import VOCAB, Rig, plain, verifier_rig

GREEDY = SamplingParams(temperature=0, max_tokens=8)
SYSTEM = [token % VOCAB for token in range(150)]  # two whole pages of 64, and a part of one
PAGES = 128


async def ask(rig: Rig, name: str, user: list[int], tenant: str = "acme") -> int:
    """One turn of a session; returns the prompt tokens found in the KV cache."""
    session = SessionKey(tenant, name, epoch=1)
    prompt = [*SYSTEM, *user]
    outcome = await rig.router.run(prompt, GREEDY, session=session, tenant=tenant)
    await rig.idle()
    assert outcome.tokens == plain(prompt, GREEDY)
    assert outcome.completed is not None
    return outcome.completed.usage.cached_tokens


async def test_pages_of_a_common_prefix_are_shared_when_sessions_differ() -> None:
    async with verifier_rig() as rig:
        assert await ask(rig, "one", [1, 2]) == 0
        alone = rig.engine.usage.used
        before = rig.engine.num_rows
        assert await ask(rig, "two", [3, 4]) == PAGES
        assert rig.engine.num_rows - before == len(SYSTEM) + 2 - PAGES + 7
        assert rig.engine.usage.used == alone + 1  # two of the three pages are the first one's


async def test_nothing_is_shared_when_the_tenants_differ() -> None:
    async with verifier_rig() as rig:
        await ask(rig, "one", [1, 2])
        assert await ask(rig, "one", [3, 4], tenant="rival") == 0


async def test_a_session_keeps_its_own_text_when_that_is_longer() -> None:
    async with verifier_rig() as rig:
        await ask(rig, "one", [1, 2])
        await ask(rig, "two", [3, 4])
        assert await ask(rig, "one", [1, 2, 5]) == len(SYSTEM) + 2


async def test_the_prefix_is_waited_for_when_it_is_being_computed() -> None:
    """Five sessions at once: the common pages are computed by the first alone."""
    engine = ToyEngine(vocab_size=VOCAB, step_s=0.002)
    async with verifier_rig(engine, max_rows=32, max_running=8) as rig:
        prompts = [[*SYSTEM, k, k] for k in range(5)]
        outcomes = await asyncio.gather(
            *(
                rig.router.run(p, GREEDY, session=SessionKey("t", str(k), 1), tenant="t")
                for k, p in enumerate(prompts)
            )
        )
    assert [o.tokens for o in outcomes] == [plain(p, GREEDY) for p in prompts]
    cached = sorted(o.completed.usage.cached_tokens for o in outcomes if o.completed)
    assert cached == [0, PAGES, PAGES, PAGES, PAGES]


async def test_the_source_stays_when_pages_are_evicted_for_the_one_that_forks_it() -> None:
    """Six pages, all taken: the oldest idle session is the very one to be forked."""
    engine = ToyEngine(vocab_size=VOCAB, pool_tokens=6 * 64)
    async with verifier_rig(engine, max_nodes=0) as rig:
        await ask(rig, "one", [1, 2])
        await ask(rig, "stranger", [1], tenant="rival")
        assert engine.usage.free == 0
        assert await ask(rig, "two", [3, 4]) == PAGES
        assert engine.usage.used == 4


async def test_an_idle_source_goes_when_its_own_pages_are_those_that_lack() -> None:
    """Six pages, five of them one idle session's: its tenant's next text needs four."""
    engine = ToyEngine(vocab_size=VOCAB, pool_tokens=6 * 64)
    async with verifier_rig(engine, max_nodes=0) as rig:
        await ask(rig, "long", [token % 7 for token in range(160)])
        assert engine.usage.used == 5
        assert await ask(rig, "next", [9] * 90) == 0
        assert engine.usage.used == 4


async def test_all_pages_come_back_when_the_sessions_are_closed() -> None:
    async with verifier_rig() as rig:
        for name in ("one", "two", "three"):
            await ask(rig, name, [7])
        for name in ("one", "two", "three"):
            rig.verifier.steps.sessions.forget(SessionKey("acme", name, epoch=1))
        assert rig.engine.usage.used == 0
        assert len(rig.verifier.steps.sessions._prefixes) == 0
