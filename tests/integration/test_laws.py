"""Both laws through real verifiers and speculators: what comes out is distributed as it should be.

The toy's target distribution after a text depends on the text's last two tokens and on a slope, one
of eight. So every output token is an observation: the rank of the token above the favoured one, in
its slope's class.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from treecast.engine.base import LogitRows, Segment
from treecast.engine.toy import ToyEngine, ToyState, toy_state
from treecast.errors import NotServed
from treecast.sampling.mss import target_probs
from treecast.sampling.noise import noise_key
from treecast.sampling.params import Law, Proposal, SamplingParams, SpeculationParams
from treecast.sampling.transforms import Context
from treecast.services.speculator.server import Speculator
from treecast.services.speculator.settings import SpeculatorSettings
from treecast.v1 import speculator_pb2_grpc
from treecast.wire.server import Server

from .verifier_rig import Rig, verifier_rig

VOCAB = 7
OUTPUT = 64
SAMPLINGS = {
    "temperature 1": SamplingParams(temperature=1, max_tokens=OUTPUT),
    "top-p": SamplingParams(temperature=1, top_p=0.85, max_tokens=OUTPUT),
}
MSS = SpeculationParams.of(Law.MSS)
MSS_IID = SpeculationParams.of(Law.MSS, Proposal.IID, "<3,1>")


@dataclass(frozen=True)
class Askew:
    """A draft's rows: the target's, flattened and bent, so that much is rejected."""

    rows: LogitRows
    bend: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int, /) -> NDArray[np.float32]:
        return 0.5 * self.rows[row] + self.bend


class DraftEngine(ToyEngine):
    """A toy that is of another mind than the target."""

    def __init__(self, seed: int) -> None:
        super().__init__(vocab_size=VOCAB)
        self._bend = np.random.default_rng(seed).normal(0, 0.7, VOCAB).astype(np.float32)

    def forward(self, segments: Sequence[Segment]) -> list[LogitRows]:
        return [Askew(rows, self._bend) for rows in super().forward(segments)]


@asynccontextmanager
async def drafting(seed: int, **fields: Any) -> AsyncIterator[str]:
    """A speculator on a real port; yields its address."""
    settings = SpeculatorSettings(engine="toy", **fields)
    thread = ThreadPoolExecutor(1)
    speculator = Speculator(settings, [DraftEngine(seed)], f"spec-{seed}", thread)
    server = Server()
    server.add(
        speculator_pb2_grpc.add_SpeculatorServiceServicer_to_server,
        speculator,
        "treecast.v1.SpeculatorService",
    )
    address = await server.listen("127.0.0.1:0")
    speculator.start()
    try:
        yield address
    finally:
        speculator.close()
        await server.stop(0)


@asynccontextmanager
async def mesh(num_speculators: int = 2, **settings: Any) -> AsyncIterator[Rig]:
    """A verifier and speculators that differ: one of a draft alone, one merged with lookup."""
    async with AsyncExitStack() as stack:
        kinds = [("ssm",), ("ssm", "ngram")]
        addresses = [
            await stack.enter_async_context(
                drafting(seed, drafters=kinds[seed % 2], growth="<2,2>")
            )
            for seed in range(num_speculators)
        ]
        settings = {"trusted_speculators": ("all",), "planner": "full", "max_rows": 400} | settings
        engine = ToyEngine(vocab_size=VOCAB)
        rig = await stack.enter_async_context(
            verifier_rig(engine, speculators=tuple(addresses), **settings)
        )
        await rig.speculators(num_speculators)
        yield rig


class Census:
    """Counts of ranks by slope, against the target's distribution."""

    def __init__(self, sampling: SamplingParams) -> None:
        self.sampling = sampling
        self.observed: Counter[tuple[int, int]] = Counter()
        self._slopes: Counter[int] = Counter()

    def add(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        state = toy_state(prompt)
        for token in output:
            slope = state.weighted_sum % 8
            self._slopes[slope] += 1
            self.observed[slope, (token - state.favoured(VOCAB)) % VOCAB] += 1
            state = state.after(token)

    @property
    def num_tokens(self) -> int:
        return self._slopes.total()

    def p_value(self) -> float:
        """Of a chi-square over all classes; what cannot come must not have come."""
        statistic, freedom = 0.0, 0
        for slope, count in self._slopes.items():
            expected = count * _rank_probs(slope, self.sampling)
            possible = expected > 0
            observed = np.array([self.observed[slope, rank] for rank in range(VOCAB)])
            assert not observed[~possible].any(), "a token came that the target never gives"
            gaps = observed[possible] - expected[possible]
            statistic += float((gaps**2 / expected[possible]).sum())
            freedom += int(possible.sum()) - 1
        return float(stats.chi2.sf(statistic, freedom))


def _rank_probs(slope: int, sampling: SamplingParams) -> NDArray[np.float64]:
    """[vocab] by rank: the favoured token of this state is 0 + 0 + 1 = 1."""
    logits = ToyState(weighted_sum=slope).logits(VOCAB)
    return np.roll(target_probs(logits, Context([]), sampling), -1)


async def take_census(
    rig: Rig, sampling: SamplingParams, speculation: SpeculationParams, num_tokens: int
) -> tuple[Census, int]:
    """Outputs of many requests, 32 at a time; returns the nodes accepted too."""
    census, accepted, keys = Census(sampling), 0, iter(range(10**9))

    async def ask_again() -> None:
        nonlocal accepted
        while census.num_tokens < num_tokens:
            prompt = [next(keys) % VOCAB, 1]
            key = noise_key(next(keys))
            asked = {"noise_key": key, "speculation": speculation}
            outcome, started = await _outcome(rig, prompt, sampling, asked)
            assert started, outcome.error
            census.add(prompt, outcome.tokens)
            accepted += outcome.completed.usage.accepted

    await asyncio.gather(*(ask_again() for _ in range(32)))
    return census, accepted


async def _outcome(
    rig: Rig, prompt: Sequence[int], sampling: SamplingParams, asked: dict[str, Any]
) -> tuple[Any, bool]:
    outcome = (rig.router.start(prompt, sampling, **asked))[1]
    async with asyncio.timeout(120):
        while outcome.completed is None and outcome.error is None:
            outcome.changed.clear()
            await outcome.changed.wait()
    return outcome, outcome.error is None


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("speculation", "name"),
    [
        pytest.param(SpeculationParams(), "top-p", id="replay", marks=pytest.mark.slow),
        pytest.param(MSS, "temperature 1", id="mss"),
        pytest.param(MSS_IID, "top-p", id="mss-iid", marks=pytest.mark.slow),
    ],
)
async def test_output_is_distributed_as_the_targets_when_served(
    speculation: SpeculationParams, name: str
) -> None:
    async with mesh() as rig:
        census, accepted = await take_census(rig, SAMPLINGS[name], speculation, 6_000)
    assert accepted > census.num_tokens / 4
    assert census.p_value() > 1e-3


@pytest.mark.slow
@pytest.mark.timeout(9000)
@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("speculation", [SpeculationParams(), MSS], ids=["replay", "mss"])
async def test_output_is_distributed_as_the_targets_when_a_million_tokens_are_served(
    speculation: SpeculationParams, name: str
) -> None:
    async with mesh() as rig:
        census, accepted = await take_census(rig, SAMPLINGS[name], speculation, 1_000_000)
    assert accepted > census.num_tokens / 4
    assert census.p_value() > 1e-3


@pytest.mark.timeout(600)
async def test_census_tells_a_law_apart_when_another_temperature_was_sampled() -> None:
    async with mesh() as rig:
        sampling = SamplingParams(temperature=0.7, max_tokens=OUTPUT)
        census, _ = await take_census(rig, sampling, MSS, 5_000)
    census.sampling = SAMPLINGS["temperature 1"]
    assert census.p_value() < 1e-6


async def test_mss_is_decoded_plainly_when_no_speculator_is_trusted_but_another() -> None:
    async with mesh(trusted_speculators=("127.0.0.1:1",)) as rig:
        census, accepted = await take_census(rig, SAMPLINGS["top-p"], MSS, 4_000)
    assert accepted == 0
    assert census.p_value() > 1e-3


async def test_mss_is_refused_when_nobody_is_trusted() -> None:
    async with mesh(trusted_speculators=()) as rig:
        outcome = await rig.router.run([1], SAMPLINGS["top-p"], speculation=MSS)
    assert isinstance(outcome.error, NotServed)
    assert outcome.error.message == "law mss is not served; this verifier has replay"


async def test_mss_goes_on_plainly_when_the_growth_chooses_by_value() -> None:
    """The speculator refuses; the text does not suffer."""
    async with mesh(num_speculators=1) as rig:
        asked = SpeculationParams.of(Law.MSS, growth="best-first")
        outcome = await rig.router.run([1], SAMPLINGS["top-p"], speculation=asked)
    assert len(outcome.tokens) == OUTPUT
    assert outcome.completed.usage.drafted == 0
