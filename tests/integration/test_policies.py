"""Policies through real ports: same text, no gap in a switch, no capacity exceeded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from treecast.engine.toy import ToyEngine
from treecast.errors import NotServed
from treecast.sampling.params import Law, SamplingParams, SpeculationParams
from treecast.services.verifier.assignments import Assignments
from treecast.services.verifier.attachments import Speculator
from treecast.services.verifier.choice.hedge import Hedge
from treecast.services.verifier.requests import Request
from treecast.tree import TokenTree
from treecast.wire.frames import (
    Attach,
    Commit,
    Detach,
    Draft,
    Heartbeat,
    Refused,
    SpeculatorFrame,
    VerifierFrame,
)
from treecast.wire.registry import Entry

from .test_verifier import Clairvoyant, Drafting, wrong
from .verifier_rig import VOCAB, Rig, ScriptedSpeculator, plain, speculator, verifier_rig

PROMPT = [5, 6, 7]
GREEDY = SamplingParams(temperature=0, max_tokens=32)
LONG = SamplingParams(temperature=0, max_tokens=120)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=32)
POLICIES = ["tree", "spin", "vote"]


def wrong_too(handle: int, text: list[int], future: list[int]) -> SpeculatorFrame:
    """The first two are right."""
    guesses = [*future[:2], *((t + 1) % VOCAB for t in future[2:])]
    return Draft(handle, len(text), TokenTree.chain(guesses, confidence=0.5))


def good(capacity: int = 64) -> ScriptedSpeculator:
    return ScriptedSpeculator(Drafting(Clairvoyant()), "good", capacity)


def poor(capacity: int = 64, name: str = "poor") -> ScriptedSpeculator:
    return ScriptedSpeculator(Drafting(wrong), name, capacity)  # type: ignore[arg-type]


@asynccontextmanager
async def mesh(
    *drafters: ScriptedSpeculator, step_s: float = 0.005, **settings: Any
) -> AsyncIterator[Rig]:
    """A verifier with open streams to all of these."""
    async with AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(speculator(each)) for each in drafters]
        engine = ToyEngine(vocab_size=VOCAB, step_s=step_s)
        rig = await stack.enter_async_context(
            verifier_rig(engine, speculators=addresses, **settings)
        )
        await rig.speculators(len(drafters))
        yield rig


def metric(rig: Rig, name: str, **labels: str) -> float:
    return rig.verifier.metrics.registry.get_sample_value(name, labels) or 0.0


def switches(rig: Rig, outcome: str) -> float:
    name = "treecast_verifier_speculator_switches_total"
    return metric(rig, name, outcome=outcome)


# --- all policies -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("planner", ["goodput", "full"])
async def test_text_is_plain_decodings_under_each_policy(policy: str, planner: str) -> None:
    third = ScriptedSpeculator(Drafting(wrong_too), "half")  # type: ignore[arg-type]
    prompts = [[5, 6, 7], [1, 2], [9], [8, 8, 8, 8]]
    settings = {"speculators_per_session": 3, "reassign_steps": 2}
    async with mesh(good(2), poor(), third, policy=policy, planner=planner, **settings) as rig:
        greedy = [rig.router.run(prompt, GREEDY) for prompt in prompts]
        sampled = [rig.router.run(prompt, SAMPLED, noise_key=5) for prompt in prompts]
        outcomes = await asyncio.gather(*greedy, *sampled)
        await rig.idle()
        assert rig.engine.usage.used == 0
    expected = [plain(prompt, GREEDY) for prompt in prompts]
    expected += [plain(prompt, SAMPLED, 5) for prompt in prompts]
    assert [outcome.tokens for outcome in outcomes] == expected
    assert sum(o.completed.usage.accepted for o in outcomes if o.completed) > 0


def attached(drafter: ScriptedSpeculator) -> list[tuple[int, ...]]:
    """Prompts of the sessions that the verifier has asked it to draft, in order."""
    attaches = (frame for frame in drafter.frames if isinstance(frame, Attach))
    return [frame.tokens[: frame.prompt_len] for frame in attaches]


@pytest.mark.parametrize("policy", ["tree", "vote"])
async def test_a_running_request_gets_the_slot_when_its_holder_ends(policy: str) -> None:
    only = good(capacity=1)
    async with mesh(only, policy=policy, planner="full") as rig:
        holder, held = rig.router.start([9], SamplingParams(temperature=0, max_tokens=900))
        await held.until(lambda o: len(o.tokens) > 1)
        _, lacking = rig.router.start(PROMPT, LONG)
        await lacking.until(lambda o: len(o.tokens) > 1)
        assert attached(only) == [(9,)]
        rig.router.cancel(holder)
        await lacking.end()
    assert attached(only) == [(9,), tuple(PROMPT)]
    assert most_at_once(only) == 1
    assert lacking.tokens == plain(PROMPT, LONG)
    assert lacking.completed is not None
    assert lacking.completed.usage.accepted > 0


async def test_a_speculator_is_asked_again_only_when_it_has_room_again() -> None:
    drafting, full = Drafting(Clairvoyant()), [True]

    def act(frame: VerifierFrame) -> Sequence[SpeculatorFrame]:
        if full[0]:
            return [Refused(frame.handle, "16 sessions; the limit is 16", no_room=True)]
        return drafting(frame)

    drafter = ScriptedSpeculator(act)
    sampling = SamplingParams(temperature=0, max_tokens=400)
    async with mesh(drafter) as rig:
        await rig.router.run(PROMPT, LONG)
        assert len(attached(drafter)) == 1
        _, outcome = rig.router.start([9], sampling)
        await outcome.until(lambda o: len(o.tokens) > 1)
        full[0], drafter.heartbeat = False, Heartbeat(free_capacity=1)
        await outcome.end()
    assert attached(drafter) == [tuple(PROMPT), (9,), (9,)]
    assert outcome.completed is not None
    assert outcome.completed.usage.accepted > 0


async def test_mss_is_refused_by_name_when_drafts_are_voted_on() -> None:
    async with mesh(policy="vote") as rig:
        outcome = await rig.router.run(PROMPT, GREEDY, speculation=SpeculationParams.of(Law.MSS))
        assert (await rig.router.run(PROMPT, GREEDY)).tokens == plain(PROMPT, GREEDY)
    assert isinstance(outcome.error, NotServed)
    assert str(outcome.error) == (
        "law mss is not served under policy vote, which prunes by value; "
        "policies tree and spin keep sibling groups"
    )


# --- spin -------------------------------------------------------------------------------------


@dataclass
class Stage:
    """What went to and came from all speculators, in order."""

    events: list[tuple[str, str]] = field(default_factory=list)

    def play(self, name: str, script: Drafting, silent_commits: int = 0) -> ScriptedSpeculator:
        """A speculator that is silent while it "reads": for its Attach and so many commits."""
        left = [silent_commits]

        def act(frame: VerifierFrame) -> Sequence[SpeculatorFrame]:
            self.events.append((name, type(frame).__name__))
            answers = list(script(frame))
            if left[0] > 0 and not isinstance(frame, Detach):
                left[0] -= isinstance(frame, Commit)
                return []
            self.events.extend((name, type(answer).__name__) for answer in answers)
            return answers

        return ScriptedSpeculator(act, name, 64 if name == "poor" else 8)

    def drafts_without_gap(self) -> bool:
        """Whether poor drafted on until good's first tree, and only until then."""
        begun = self.events.index(("good", "Attach"))
        taken_over = self.events.index(("good", "Draft"))
        left = self.events.index(("poor", "Detach"))
        meanwhile = self.events[begun:taken_over]
        return left > taken_over and meanwhile.count(("poor", "Draft")) >= 2


async def run_switch(stage: Stage, rig: Rig) -> None:
    outcome = await rig.router.run(PROMPT, LONG)
    assert outcome.tokens == plain(PROMPT, LONG)


def actors(stage: Stage) -> tuple[ScriptedSpeculator, ScriptedSpeculator]:
    """Poor has more room, so a newcomer goes there first."""
    return (
        stage.play("poor", Drafting(wrong)),  # type: ignore[arg-type]
        stage.play("good", Drafting(Clairvoyant()), silent_commits=3),
    )


SPIN: dict[str, Any] = {"policy": "spin", "planner": "full", "reassign_steps": 8}


async def test_old_speculator_drafts_until_the_new_ones_first_tree() -> None:
    stage = Stage()
    async with mesh(*actors(stage), **SPIN) as rig:
        await run_switch(stage, rig)
        assert stage.drafts_without_gap()
        assert switches(rig, "done") >= 1
        name = "treecast_verifier_speculator_choices_total"
        assert metric(rig, name, speculator="good") > metric(rig, name, speculator="poor")


async def test_gap_is_seen_when_the_old_one_is_let_go_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    move = Assignments._move

    def hasty(self: Assignments, request: Request, to: Speculator) -> None:
        move(self, request, to)
        self.take_over(request, self._attachments[request.handle][-1])

    monkeypatch.setattr(Assignments, "_move", hasty)
    stage = Stage()
    async with mesh(*actors(stage), **SPIN) as rig:
        await run_switch(stage, rig)
        assert not stage.drafts_without_gap()


async def test_steps_do_not_wait_for_a_speculator_that_still_reads() -> None:
    """Were it waited for, each of its silent steps would last a second."""
    stage = Stage()
    async with mesh(*actors(stage), **SPIN) as rig:
        async with asyncio.timeout(2.5):
            await run_switch(stage, rig)


async def test_switch_is_given_up_when_the_new_one_stays_silent() -> None:
    stage = Stage()
    mute = stage.play("good", Drafting(Clairvoyant()), silent_commits=10_000)
    async with mesh(stage.play("poor", Drafting(wrong)), mute, **SPIN) as rig:  # type: ignore[arg-type]
        await run_switch(stage, rig)
        assert switches(rig, "abandoned") == 1
        assert stage.events.count(("good", "Attach")) == 1  # and it is not tried again
        assert stage.events.count(("good", "Detach")) == 1


async def test_switch_is_given_up_when_the_new_one_refuses() -> None:
    refusing = ScriptedSpeculator(lambda frame: [Refused(frame.handle, "no")], "good", 8)
    async with mesh(poor(), refusing, **SPIN) as rig:
        assert (await rig.router.run(PROMPT, LONG)).tokens == plain(PROMPT, LONG)
        assert attached(refusing) == [tuple(PROMPT)]
        assert (switches(rig, "begun"), switches(rig, "done")) == (1, 0)
        assert switches(rig, "abandoned") == 1


async def test_new_speculator_stays_when_the_old_one_dies_during_a_switch() -> None:
    stage = Stage()
    old, new = stage.play("poor", Drafting(wrong)), good(8)  # type: ignore[arg-type]
    async with speculator(new) as address, mesh(**SPIN) as rig:
        async with speculator(old) as dying:
            rig.verifier._speculators.follow((Entry(dying), Entry(address)))
            await rig.speculators(2)
            _, outcome = rig.router.start(PROMPT, LONG)
            async with asyncio.timeout(5):
                while not any(isinstance(frame, Attach) for frame in new.frames):
                    new.got.clear()
                    await new.got.wait()
        await outcome.end()
    assert outcome.tokens == plain(PROMPT, LONG)
    assert outcome.completed is not None
    assert outcome.completed.usage.accepted > 0


def most_at_once(drafter: ScriptedSpeculator) -> int:
    """Most sessions that the verifier had attached there at one time."""
    live: set[int] = set()
    most = 0
    for frame in drafter.frames:
        if isinstance(frame, Attach):
            live.add(frame.handle)
        elif isinstance(frame, Detach):
            live.discard(frame.handle)
        most = max(most, len(live))
    return most


async def test_no_capacity_is_exceeded_when_sessions_are_more_than_slots() -> None:
    best, other = good(2), poor(3)
    async with mesh(best, other, policy="spin", reassign_steps=2) as rig:
        prompts = [[n, n + 1] for n in range(8)]
        outcomes = await asyncio.gather(*(rig.router.run(p, LONG) for p in prompts))
        assert switches(rig, "done") >= 1
    assert [o.tokens for o in outcomes] == [plain(p, LONG) for p in prompts]
    assert most_at_once(best) == 2
    assert most_at_once(other) <= 3


async def test_the_best_drafter_is_full_when_slots_are_short() -> None:
    """Six sessions, two slots at the best: it is never idle for long."""
    best, other = good(2), poor(8)
    async with mesh(best, other, policy="spin", reassign_steps=2) as rig:
        await asyncio.gather(*(rig.router.run([n, 3], LONG) for n in range(6)))
    drafts = [sum(isinstance(f, Commit) for f in each.frames) for each in (best, other)]
    assert drafts[0] > 0.1 * sum(drafts)


# --- vote -------------------------------------------------------------------------------------


def jury() -> tuple[ScriptedSpeculator, ...]:
    """Two of three are wrong, and agree."""
    return good(), poor(name="poor-1"), poor(name="poor-2")


VOTE: dict[str, Any] = {"policy": "vote", "planner": "full", "speculators_per_session": 3}


async def accepted_under_vote(rig: Rig) -> int:
    outcomes = await asyncio.gather(*(rig.router.run([n, 3], LONG) for n in range(2)))
    assert [o.tokens for o in outcomes] == [plain([n, 3], LONG) for n in range(2)]
    return sum(o.completed.usage.accepted for o in outcomes if o.completed)


async def test_votes_follow_the_drafter_that_is_right() -> None:
    async with mesh(*jury(), **VOTE) as rig:
        accepted = await accepted_under_vote(rig)
        name = "treecast_verifier_vote_weight"
        weights = {
            voter: metric(rig, name, voter=f"spec-{voter}/0:{voter}")
            for voter in ("good", "poor-1", "poor-2")
        }
        assert weights["good"] > weights["poor-1"] + weights["poor-2"]
        assert metric(rig, "treecast_verifier_speculation_length_tokens") >= 1
    assert accepted > 100  # of 240 tokens, with at most 4 of 5 from a draft


async def test_the_wrong_majority_wins_when_weights_are_not_learned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Hedge, "saw", lambda self, verdicts: None)
    async with mesh(*jury(), **VOTE) as rig:
        assert await accepted_under_vote(rig) == 0


async def test_a_voter_is_forgotten_when_its_stream_ends() -> None:
    name, voter = "treecast_verifier_vote_weight", "spec-good/0:good"
    async with mesh(**VOTE) as rig:
        async with speculator(good()) as address:
            rig.verifier._speculators.follow((Entry(address),))
            await rig.speculators(1)
            assert (await rig.router.run(PROMPT, GREEDY)).tokens == plain(PROMPT, GREEDY)
            assert metric(rig, name, voter=voter) > 0
        await rig.speculators(0)
        await rig.router.run(PROMPT, GREEDY)
        assert metric(rig, name, voter=voter) == 0
