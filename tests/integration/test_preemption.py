"""Requests that are paused and go on, through a verifier's real port."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from treecast.engine.base import Engine, Segment
from treecast.engine.hf import HFEngine
from treecast.engine.host_kv import HostKV
from treecast.engine.toy import TokenStorage, ToyEngine
from treecast.errors import DeadlineExceeded, EngineLost, HandedOver
from treecast.sampling.params import Law, SamplingParams, SpeculationParams
from treecast.sampling.stops import FinishReason
from treecast.services.verifier.schedule import MIN_RUN_STEPS
from treecast.wire.frames import Attach, Detach, Forget, SessionKey

from ..unit.tiny_target import tiny_target
from .test_verifier import Clairvoyant, Drafting
from .verifier_rig import (
    VOCAB,
    Outcome,
    Rig,
    ScriptedSpeculator,
    plain,
    speculator,
    verifier_rig,
)

LONG = [5, 6, 7] * 7
SHORT = [9, 9]
SAMPLINGS = [SamplingParams(temperature=0, max_tokens=100), SamplingParams(max_tokens=100)]
FATES: list[tuple[str, int, float]] = [("kept", 1024, 4), ("swapped", 192, 4), ("dropped", 192, 0)]
"""Where a paused request's KV goes, in a pool of so many positions, with so many GiB beside it."""
ONE_SLOT = {"schedule": "length", "max_running": 1, "max_nodes": 4}


def value(rig: Rig, name: str, **labels: str) -> float:
    found = rig.verifier.metrics.registry.get_sample_value(f"treecast_verifier_{name}", labels)
    assert found is not None, name
    return found


async def nothing_is_left(rig: Rig) -> None:
    await rig.idle()
    assert rig.engine.usage.used == 0
    assert rig.verifier.steps._scheduler.swap.used_bytes == 0
    assert value(rig, "swapped_bytes") == value(rig, "paused_requests") == 0


def after(rig: Rig, outcome: Outcome) -> Any:
    """Wait until it has run for long enough to be preempted."""
    return outcome.until(lambda o: len(o.tokens) > MIN_RUN_STEPS + 44)


async def overtake(rig: Rig, sampling: SamplingParams, **fields: Any) -> tuple[Outcome, Outcome]:
    """A long request, and one that is far shorter and takes its slot."""
    _, long = rig.router.start(LONG, sampling, noise_key=3, expected_tokens=100, **fields)
    await after(rig, long)
    short = SamplingParams(temperature=sampling.temperature, max_tokens=30)
    prompt = SHORT * 40
    quick = await rig.router.run(prompt, short, noise_key=4, expected_tokens=3, **fields)
    assert long.completed is None
    await long.end()
    return long, quick


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize(("fate", "pool", "swap"), FATES)
async def test_text_is_plain_decoding_when_a_request_is_preempted_by_a_shorter_one(
    fate: str, pool: int, swap: float, sampling: SamplingParams
) -> None:
    engine = ToyEngine(vocab_size=VOCAB, pool_tokens=pool, step_s=0.002)
    async with verifier_rig(engine, swap_gib=swap, **ONE_SLOT) as rig:
        long, quick = await overtake(rig, sampling)
        assert value(rig, "preemptions_total", why="length") == 1
        assert (value(rig, "swap_bytes_total", direction="out") > 0) == (fate == "swapped")
        assert (value(rig, "dropped_kv_tokens_total") > 0) == (fate == "dropped")
        assert value(rig, "swap_bytes_total", direction="in") == value(
            rig, "swap_bytes_total", direction="out"
        )
        await nothing_is_left(rig)
    assert long.tokens == plain(LONG, sampling, 3)
    short = SamplingParams(temperature=sampling.temperature, max_tokens=30)
    assert quick.tokens == plain(SHORT * 40, short, 4)
    assert long.completed is not None
    assert long.completed.usage.cached_tokens == 0
    assert not engine.storage.saved


async def test_text_differs_when_swapped_kv_comes_back_shifted() -> None:
    """The negative control: the tests above would see it."""

    class Shifting(TokenStorage):
        def load(self, key: int, places: Sequence[int]) -> None:
            super().load(key, [*places[1:], places[0]])

    engine = ToyEngine(vocab_size=VOCAB, pool_tokens=192, step_s=0.002)
    engine.storage.__class__ = Shifting
    async with verifier_rig(engine, **ONE_SLOT) as rig:
        long, _ = await overtake(rig, SAMPLINGS[1])
    assert long.tokens != plain(LONG, SAMPLINGS[1], 3)


async def test_a_paused_request_leaves_its_speculator_and_goes_on_with_one() -> None:
    drafter = ScriptedSpeculator(Drafting(Clairvoyant()))
    engine = ToyEngine(vocab_size=VOCAB, pool_tokens=256, step_s=0.02)
    sampling = SAMPLINGS[1]
    async with (
        speculator(drafter) as address,
        verifier_rig(engine, speculators=[address], **ONE_SLOT) as rig,
    ):
        await rig.speculators(1)
        _, long = rig.router.start(LONG, sampling, noise_key=3, expected_tokens=100)
        await long.until(lambda o: len(o.tokens) > 4)
        rig.verifier.steps._scheduler.roster.running[0].began_step = -MIN_RUN_STEPS
        await rig.router.run(SHORT, SamplingParams(max_tokens=8), expected_tokens=3)
        await long.end()
        assert value(rig, "preemptions_total", why="length") == 1
        await nothing_is_left(rig)
    assert long.tokens == plain(LONG, sampling, 3)
    frames = [type(f) for f in drafter.frames if f.handle == 1 and isinstance(f, Attach | Detach)]
    assert frames[:3] == [Attach, Detach, Attach]


@pytest.mark.parametrize("swap", [4, 0])
async def test_all_end_right_when_texts_outgrow_the_pool(swap: float) -> None:
    """Four requests that need 4 pages each in the end, in 8 pages: three begin, some pause."""
    engine = ToyEngine(vocab_size=VOCAB, pool_tokens=512, step_s=0.001)
    sampling = SamplingParams(max_tokens=240)
    async with verifier_rig(engine, swap_gib=swap) as rig:
        ends = [rig.router.run([k, 1], sampling, noise_key=k) for k in range(4)]
        outcomes = await asyncio.gather(*ends)
        assert value(rig, "preemptions_total", why="memory") > 0
        assert value(rig, "preemptions_total", why="length") == 0
        await nothing_is_left(rig)
    for k, outcome in enumerate(outcomes):
        assert outcome.error is None
        assert outcome.tokens == plain([k, 1], sampling, k)


async def test_trees_are_cut_before_anybody_is_paused_for_them() -> None:
    """Two texts of 64 positions fill both pages to the last place."""
    drafter = ScriptedSpeculator(Drafting(Clairvoyant()))
    engine = ToyEngine(vocab_size=VOCAB, pool_tokens=192, step_s=0.01)
    settings: dict[str, Any] = {
        "planner": "full", "max_rows": 24, "max_running": 8, "max_nodes": 16
    }  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=60)
    async with (
        speculator(drafter) as address,
        verifier_rig(engine, speculators=[address], **settings) as rig,
    ):
        await rig.speculators(1)
        outcomes = await asyncio.gather(*(rig.router.run([k] * 4, sampling) for k in (1, 2, 3)))
        assert value(rig, "preemptions_total", why="memory") == 0
        await nothing_is_left(rig)
    for k, outcome in zip((1, 2, 3), outcomes, strict=True):
        assert outcome.tokens == plain([k] * 4, sampling)
        assert outcome.completed is not None
        assert outcome.completed.usage.accepted > 30


async def test_an_aged_request_ends_though_shorter_ones_keep_coming() -> None:
    engine = ToyEngine(vocab_size=VOCAB, step_s=0.002)
    async with verifier_rig(engine, aging_s=0.3, **ONE_SLOT) as rig:
        _, long = rig.router.start(LONG, SAMPLINGS[0], expected_tokens=100)
        await after(rig, long)
        count = 0
        while long.completed is None and count < 1000:
            await rig.router.run(SHORT, SamplingParams(max_tokens=2), expected_tokens=2)
            count += 1
        assert long.tokens == plain(LONG, SAMPLINGS[0])
        await nothing_is_left(rig)


async def test_a_request_of_higher_priority_goes_first() -> None:
    engine = ToyEngine(vocab_size=VOCAB, step_s=0.002)
    async with verifier_rig(engine, **ONE_SLOT) as rig:
        _, low = rig.router.start(LONG, SAMPLINGS[0], expected_tokens=80)
        await after(rig, low)
        _, high = rig.router.start(SHORT, SAMPLINGS[0], expected_tokens=100, priority=1)
        await high.end()
        assert low.completed is None
        await low.end()


# --- ends of paused requests ------------------------------------------------------------------


async def with_one_paused(rig: Rig, **fields: Any) -> tuple[int, Outcome, int, Outcome]:
    """A long request that is paused, and the one that runs in its place."""
    handle, long = rig.router.start(LONG, SAMPLINGS[0], expected_tokens=100, **fields)
    await after(rig, long)
    other, quick = rig.router.start(SHORT * 30, SAMPLINGS[0], expected_tokens=2, priority=5)
    await quick.until(lambda o: len(o.tokens) > 0)
    assert value(rig, "paused_requests") == 1
    beat = rig.verifier.steps.heartbeat(num_preparing=0, draining=False)
    assert (beat.running, beat.waiting, beat.free_capacity) == (1, 1, 0)
    return handle, long, other, quick


@pytest.mark.parametrize(("fate", "pool", "swap"), FATES)
@pytest.mark.parametrize("end", ["cancel", "deadline", "close", "hand over", "router"])
async def test_nothing_is_held_when_a_paused_request_ends(
    end: str, fate: str, pool: int, swap: float
) -> None:
    engine = ToyEngine(vocab_size=VOCAB, pool_tokens=pool, step_s=0.004)
    session = SessionKey("tenant", "s", 1)
    async with verifier_rig(engine, swap_gib=swap, **ONE_SLOT) as rig:
        handle, long, _, quick = await with_one_paused(rig, session=session)
        assert (value(rig, "swapped_bytes") > 0) == (fate == "swapped")
        scheduled = rig.verifier.steps._scheduler.roster.paused[0]
        rig.router.link.send(Forget(session))
        if end == "cancel":
            rig.router.cancel(handle)
        elif end == "deadline":
            scheduled.deadline = 0.0
        elif end == "hand over":
            rig.verifier.steps.hand_over()
        elif end == "router":
            await rig.router.dialer.close()
            await nothing_is_left(rig)
            return
        await long.end()
        await quick.end()
        await nothing_is_left(rig)
        if end == "hand over":
            assert isinstance(long.error, HandedOver)
            return
        reasons = {
            "cancel": FinishReason.CANCELLED,
            "deadline": FinishReason.DEADLINE,
            "close": FinishReason.LENGTH,
        }
        assert long.completed is not None
        assert long.completed.finish is reasons[end]
        assert long.tokens == plain(LONG, SAMPLINGS[0])[: len(long.tokens)]


async def test_a_session_keeps_what_was_computed_when_its_paused_request_is_cancelled() -> None:
    session = SessionKey("tenant", "s", 1)
    async with verifier_rig(ToyEngine(vocab_size=VOCAB, step_s=0.004), **ONE_SLOT) as rig:
        handle, long, _, quick = await with_one_paused(rig, session=session)
        rig.router.cancel(handle)
        await long.end()
        await quick.end()
        text = [*LONG, *long.tokens]
        again = await rig.router.run([*text, 1], SamplingParams(max_tokens=2), session=session)
    assert again.completed is not None
    assert again.completed.usage.cached_tokens == len(text) - 1


async def test_a_drain_waits_for_paused_requests() -> None:
    async with verifier_rig(ToyEngine(vocab_size=VOCAB, step_s=0.002), **ONE_SLOT) as rig:
        _, long, _, quick = await with_one_paused(rig)
        await rig.verifier.drain()
        await asyncio.gather(long.end(), quick.end())
        assert long.tokens == plain(LONG, SAMPLINGS[0])


async def test_routers_hear_that_all_is_lost_when_the_engine_is() -> None:
    lost = threading.Event()

    def lose(segments: Sequence[Segment]) -> None:
        if lost.is_set():
            raise EngineLost("a rank is gone")

    engine = ToyEngine(vocab_size=VOCAB, step_s=0.004, on_forward=lose)
    async with verifier_rig(engine, **ONE_SLOT) as rig:
        rig.verifier._stepping.remove_done_callback(  # type: ignore[union-attr]
            __import__("treecast.services.verifier.server", fromlist=["x"])._stop_if_broken
        )
        _, long, _, quick = await with_one_paused(rig)
        lost.set()
        async with asyncio.timeout(60):
            while rig.router.open.is_set():
                await asyncio.sleep(0.01)
        assert long.completed is None
        assert quick.completed is None
        with pytest.raises(EngineLost):
            await rig.verifier.drain()


async def test_a_waiting_request_is_late_and_a_paused_one_is_cut() -> None:
    async with verifier_rig(ToyEngine(vocab_size=VOCAB, step_s=0.004), **ONE_SLOT) as rig:
        _, _, _, quick = await with_one_paused(rig)
        late = await rig.router.run(LONG, SAMPLINGS[0], expected_tokens=900, deadline_ms=20)
        assert isinstance(late.error, DeadlineExceeded)
        await quick.end()


# --- a real model -----------------------------------------------------------------------------

TINY = {"schedule": "length", "max_running": 1, "trusted_speculators": ["all"]}
CASES = [
    pytest.param(0.0, Law.REPLAY, id="greedy", marks=pytest.mark.slow),
    pytest.param(1.0, Law.REPLAY, id="sampled"),
    pytest.param(1.0, Law.MSS, id="mss", marks=pytest.mark.slow),
]


def engine_of(folder: Path, pool_tokens: int) -> HFEngine:
    return HFEngine.load(folder, dtype="bfloat16", numerics="exact", pool_tokens=pool_tokens)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_target().save_pretrained(folder)
    return folder


async def preempted_text(engine: Engine, swap: float, temperature: float, law: Law) -> list[int]:
    """What a long request comes to when one that fills the other page takes its slot, or none."""
    sampling = SamplingParams(temperature=temperature, max_tokens=80, ignore_eos=True)
    speculation = SpeculationParams.of(law)
    async with verifier_rig(engine, swap_gib=swap, **TINY) as rig:  # type: ignore[arg-type]
        _, long = rig.router.start(
            [3, 4, 5] * 4, sampling, noise_key=7, expected_tokens=80, speculation=speculation
        )
        await long.until(lambda o: len(o.tokens) > 55)
        if engine.usage.total < 8:
            short = SamplingParams(temperature=temperature, max_tokens=20, ignore_eos=True)
            await rig.router.run([6] * 60, short, priority=1, speculation=speculation)
            assert value(rig, "preemptions_total", why="length") == 1
            assert (value(rig, "swap_bytes_total", direction="in") > 0) == (swap > 0)
        await long.end()
        await nothing_is_left(rig)
    return long.tokens


@pytest.mark.parametrize(("temperature", "law"), CASES)
async def test_text_is_the_same_when_a_real_models_request_was_preempted(
    tiny: Path, temperature: float, law: Law
) -> None:
    undisturbed = await preempted_text(engine_of(tiny, 1024), 4, temperature, law)
    assert len(undisturbed) == 80
    for swap in (4, 0):
        found = await preempted_text(engine_of(tiny, 128), swap, temperature, law)
        assert found == undisturbed


async def test_text_of_a_real_model_differs_when_swapped_kv_is_lost(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    undisturbed = await preempted_text(engine_of(tiny, 1024), 4, 1.0, Law.REPLAY)
    load = HostKV.load

    def zero(self: HostKV, key: int, places: Sequence[int]) -> None:
        self._buffers[key].zero_()
        load(self, key, places)

    monkeypatch.setattr(HostKV, "load", zero)
    assert await preempted_text(engine_of(tiny, 128), 4, 1.0, Law.REPLAY) != undisturbed
