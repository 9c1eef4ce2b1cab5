"""Adapters by request through real ports: who computes what, and whose KV is whose."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from treecast import SamplingParams
from treecast.engine.toy import ToyEngine
from treecast.errors import InvalidRequest, ModelError, NotServed, SettingsError
from treecast.services.router.server import Router
from treecast.services.router.settings import RouterSettings
from treecast.services.verifier.loading import check_adapters
from treecast.services.verifier.settings import VerifierSettings
from treecast.wire.frames import SessionKey

from .scripted_verifier import ScriptedVerifier
from .toy_mesh import GREEDY, NUMBERS, Mesh, toy_speculator, toy_verifier
from .verifier_rig import VOCAB, Rig, plain, verifier_rig

SHORT = SamplingParams(temperature=0, max_tokens=8)
SYSTEM = [token % VOCAB for token in range(150)]  # two whole pages of 64, and a part of one
PAGES = 128
SHIFTS = {"": 0, "one": 1, "two": 2}


def engine(**options: Any) -> ToyEngine:
    return ToyEngine(vocab_size=VOCAB, adapters={"one": 1, "two": 2}, **options)


async def ask(rig: Rig, name: str, user: list[int], adapter: str) -> int:
    """One turn of a session; returns the prompt tokens found in the KV cache."""
    prompt = [*SYSTEM, *user]
    outcome = await rig.router.run(
        prompt, SHORT, session=SessionKey("acme", name, epoch=1), tenant="acme", adapter=adapter
    )
    await rig.idle()
    assert outcome.error is None
    assert outcome.tokens == plain(prompt, SHORT, shift=SHIFTS[adapter])
    assert outcome.completed is not None
    return outcome.completed.usage.cached_tokens


async def test_each_request_gets_its_adapter_when_they_share_steps() -> None:
    async with verifier_rig(engine(step_s=0.002)) as rig:
        names = list(SHIFTS) * 3
        outcomes = await asyncio.gather(
            *(rig.router.run([5, 6, k], SHORT, adapter=name) for k, name in enumerate(names))
        )
        for k, (name, outcome) in enumerate(zip(names, outcomes, strict=True)):
            assert outcome.tokens == plain([5, 6, k], SHORT, shift=SHIFTS[name])


async def test_pages_are_shared_with_the_same_adapter_only() -> None:
    async with verifier_rig(engine()) as rig:
        assert await ask(rig, "a", [1, 2], "one") == 0
        assert await ask(rig, "b", [3, 4], "two") == 0
        assert await ask(rig, "c", [3, 4], "") == 0
        assert await ask(rig, "d", [5, 6], "one") == PAGES
        assert await ask(rig, "e", [5, 6], "") == PAGES


async def test_a_session_begins_anew_when_its_adapter_changes() -> None:
    async with verifier_rig(engine()) as rig:
        assert await ask(rig, "a", [1], "one") == 0
        assert await ask(rig, "a", [1, 2], "one") == len(SYSTEM) + 1
        assert await ask(rig, "a", [1, 2, 3], "two") == 0
        used = rig.engine.usage.used
        assert await ask(rig, "a", [1, 2, 3], "") == 0
        assert rig.engine.usage.used == used  # what the other adapter left is free again


async def test_running_siblings_share_nothing_when_their_adapters_differ() -> None:
    async with verifier_rig(engine(step_s=0.002)) as rig:
        session = SessionKey("acme", "s", epoch=1)
        outcomes = await asyncio.gather(
            *(
                rig.router.run(SYSTEM, SHORT, session=session, tenant="acme", adapter=name)
                for name in SHIFTS
            )
        )
        for name, outcome in zip(SHIFTS, outcomes, strict=True):
            assert outcome.error is None
            assert outcome.tokens == plain(SYSTEM, SHORT, shift=SHIFTS[name])


async def test_unknown_adapter_is_refused_by_the_verifier_with_the_list() -> None:
    async with verifier_rig(engine()) as rig:
        outcome = await rig.router.run([5], SHORT, adapter="three")
        assert isinstance(outcome.error, NotServed)
        assert outcome.error.message == (
            "adapter 'three' is not served with model 'toy'; served: one, two"
        )


@asynccontextmanager
async def mixed_mesh() -> AsyncIterator[Mesh]:
    """Three verifiers: with both adapters, with one of them, with none; and a speculator."""
    async with AsyncExitStack() as stack:
        speculator = await stack.enter_async_context(toy_speculator())
        workers = [
            await stack.enter_async_context(
                toy_verifier(shifts=shifts, speculators=(speculator,), planner="full")
            )
            for shifts in ({"one": 1, "two": 2}, {"one": 1}, {})
        ]
        settings = RouterSettings(
            verifiers=tuple(worker.address for worker in workers), metrics_listen=None
        )
        router = await stack.enter_async_context(Router(settings, f"router-{next(NUMBERS)}"))
        mesh = Mesh(router, workers, [speculator], {})
        await mesh.until(lambda: len(router.fleet.candidates()) == len(workers))
        yield mesh


async def test_requests_go_where_their_adapter_is() -> None:
    async with mixed_mesh() as mesh, mesh.client() as client:
        for k in range(4):
            prompt = [5, 6, k]
            for name, shift in SHIFTS.items():
                result = await client.generate(prompt, GREEDY, adapter=name or None).result()
                assert list(result.token_ids) == plain(prompt, GREEDY, shift=shift)
                assert (result.model, result.adapter) == ("toy", name)
                assert result.usage.output_tokens == 24
        many = [client.generate([5, 6, k], GREEDY, adapter="two").result() for k in range(12)]
        for k, result in enumerate(await asyncio.gather(*many)):
            assert list(result.token_ids) == plain([5, 6, k], GREEDY, shift=2)


async def test_an_adapters_name_stands_for_the_model_with_it() -> None:
    async with mixed_mesh() as mesh, mesh.client() as client:
        result = await client.generate([5, 6], GREEDY, model="two").result()
        assert list(result.token_ids) == plain([5, 6], GREEDY, shift=2)
        assert (result.model, result.adapter) == ("toy", "two")
        (model,) = await client.models()
        assert set(model.adapters) == {"one", "two"}
        assert model.verifiers == 3


async def test_unknown_adapter_is_refused_by_the_router_with_the_list() -> None:
    async with mixed_mesh() as mesh, mesh.client() as client:
        with pytest.raises(
            NotServed, match=r"^adapter 'three' is not served with model 'toy'; served: one, two$"
        ):
            await client.generate([5], GREEDY, adapter="three").result()
        with pytest.raises(NotServed, match=r"^model 'three' is not served; served: toy$"):
            await client.generate([5], GREEDY, model="three").result()
        with pytest.raises(InvalidRequest, match=r"^adapter is '../three'; a name has 1 to 64"):
            await client.generate([5], GREEDY, adapter="../three").result()


async def test_a_grammar_goes_where_it_is_kept_when_some_verifiers_keep_none() -> None:
    keeps = ScriptedVerifier("keeps", keeps_grammars=True)
    lacks = [ScriptedVerifier(f"lacks-{k}") for k in range(3)]
    held = SamplingParams(max_tokens=4, regex="[a-z]+")
    async with AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(one) for one in (*lacks, keeps)]
        settings = RouterSettings(
            verifiers=tuple(one.address for one in workers), metrics_listen=None
        )
        router = await stack.enter_async_context(Router(settings, f"router-{next(NUMBERS)}"))
        mesh = Mesh(router, [], "", {})
        await mesh.until(lambda: len(router.fleet.candidates()) == len(workers))
        async with mesh.client() as client:
            for k in range(6):
                await client.generate([97, k], held).result()
                await client.generate([97, k], SamplingParams(max_tokens=4)).result()
            assert sum(1 for one in keeps.started if one.sampling.regex) == 6
            assert not any(start.sampling.regex for one in lacks for start in one.started)
            await keeps.kill()
            await mesh.until(lambda: len(router.fleet.candidates()) == len(lacks))
            with pytest.raises(NotServed, match=r"^regex is not kept by any verifier of model 'b"):
                await client.generate([97], held).result()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("lora", "'lora' is not NAME=FOLDER; a name has 1 to 64 letters"),
        ("a/b=x", "'a/b=x' is not NAME=FOLDER"),
        ("a=x,a=y", "adapter 'a' is given 2 times"),
    ],
)
def test_malformed_setting_is_refused_by_name(given: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=f"--adapters .*{reason}"):
        VerifierSettings.load(["--adapters", given], "verifier")


def test_adapters_are_refused_where_they_cannot_be_served() -> None:
    with pytest.raises(ModelError, match=r"for a group of 2 ranks \(--tp 2, --pp 1\)"):
        check_adapters(VerifierSettings(adapters=("a=x",), tp=2))
    with pytest.raises(ModelError, match=r"for the toy engine"):
        check_adapters(VerifierSettings(adapters=("a=x",), engine="toy"))
    with pytest.raises(ModelError, match=r"^adapters a, b cannot be served with offload disk;"):
        check_adapters(VerifierSettings(adapters=("a=x", "b=y"), offload="disk"))
    with pytest.raises(ModelError, match=r"^adapter 'mine' has the name of the model itself$"):
        check_adapters(VerifierSettings(adapters=("mine=x",), model="/models/mine"))
