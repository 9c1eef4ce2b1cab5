"""The verifier service through its real port, with a hand-computable model."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest
import structlog
from numpy.typing import NDArray

from treecast.draws import Draws, Proposal
from treecast.engine.base import Segment
from treecast.engine.toy import ToyEngine
from treecast.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelError,
    NotServed,
    Overloaded,
    PromptTooLong,
    StaleLease,
)
from treecast.sampling.params import Law, SamplingParams, SpeculationParams
from treecast.sampling.pick import Picker
from treecast.sampling.stops import FinishReason
from treecast.services.verifier.attachments import MOST_SYNCS
from treecast.services.verifier.loading import read_tokenizer
from treecast.services.verifier.speculation import Speculation
from treecast.text.tokenizer import TokenizerFiles
from treecast.tree import ROOT, TokenTree
from treecast.v1 import verifier_pb2, verifier_pb2_grpc
from treecast.wire.channel import MAX_ANSWER_BYTES, MAX_MESSAGE_BYTES, open_channel
from treecast.wire.frames import (
    Attach,
    Commit,
    Cost,
    Detach,
    Draft,
    Forget,
    NeedSync,
    Refused,
    SessionKey,
    SpeculatorFrame,
    VerifierFrame,
)
from treecast.wire.link import Link
from treecast.wire.registry import Entry

from ..byte_tokenizer import byte_tokenizer
from .verifier_rig import VOCAB, ScriptedSpeculator, plain, speculator, verifier_rig

GREEDY = SamplingParams(temperature=0, max_tokens=24)
SAMPLED = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=24)
PROMPT = [5, 6, 7]


class Drafting:
    """A script that answers every commit with a tree built from the session's own future."""

    def __init__(self, make: Clairvoyant) -> None:
        self.make = make
        self.texts: dict[int, list[int]] = {}
        self.attached: dict[int, Attach] = {}

    def __call__(self, frame: VerifierFrame) -> Sequence[SpeculatorFrame]:
        if isinstance(frame, Detach):
            return []
        if isinstance(frame, Attach):
            self.texts[frame.handle], self.attached[frame.handle] = list(frame.tokens), frame
        else:
            self.texts[frame.handle] += frame.tokens
        text, attach = self.texts[frame.handle], self.attached[frame.handle]
        if frame.node_budget == 0:
            return []
        future = plain_after(attach, text, 4)
        return [self.make(frame.handle, text, future)]


class Clairvoyant:
    """The right four tokens, as a chain below the newest commit."""

    def __call__(self, handle: int, text: list[int], future: list[int]) -> SpeculatorFrame:
        return Draft(handle, len(text), TokenTree.chain(future))


def plain_after(attach: Attach, text: list[int], count: int) -> list[int]:
    done = len(text) - attach.prompt_len
    sampling = SamplingParams(
        temperature=attach.sampling.temperature, top_p=attach.sampling.top_p,
        max_tokens=done + count,
    )  # fmt: skip
    return plain(text[: attach.prompt_len], sampling, attach.noise_key)[done:]


# --- plain decoding ---------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
async def test_output_is_plain_decoding_when_nobody_drafts(sampling: SamplingParams) -> None:
    async with verifier_rig() as rig:
        outcome = await rig.router.run(PROMPT, sampling, noise_key=11)
    assert outcome.tokens == plain(PROMPT, sampling, 11)
    assert outcome.completed is not None
    assert outcome.completed.finish is FinishReason.LENGTH
    usage = outcome.completed.usage
    assert (usage.steps, usage.drafted, usage.prompt_tokens) == (24, 0, 3)


async def test_prompt_is_computed_in_chunks_when_it_exceeds_a_step() -> None:
    prompt = [token % VOCAB for token in range(300)]
    async with verifier_rig(max_rows=32, max_running=8) as rig:
        outcome = await rig.router.run(prompt, GREEDY)
    assert outcome.tokens == plain(prompt, GREEDY)


async def test_logprobs_come_with_every_token_when_asked_for() -> None:
    sampling = SamplingParams(temperature=0, max_tokens=5, logprobs=2)
    async with verifier_rig() as rig:
        outcome = await rig.router.run(PROMPT, sampling)
    assert [entry.top_ids[0] for entry in outcome.logprobs] == outcome.tokens


async def test_gauges_show_what_is_held_now_when_the_last_request_has_ended() -> None:
    async with verifier_rig() as rig:
        await rig.router.run(PROMPT, GREEDY)
        await rig.idle()
        read = rig.verifier.metrics.registry.get_sample_value
        assert read("treecast_verifier_running_requests") == 0
        assert read("treecast_verifier_kv_pages", {"state": "used"}) == 0
        assert read("treecast_verifier_kv_pages", {"state": "free"}) == rig.engine.usage.total


async def test_newcomer_starts_before_older_requests_finish() -> None:
    async with verifier_rig(ToyEngine(vocab_size=VOCAB, step_s=0.002)) as rig:
        _, old = rig.router.start(PROMPT, SamplingParams(temperature=0, max_tokens=200))
        await old.until(lambda o: len(o.tokens) > 3)
        _, young = rig.router.start([9, 9], GREEDY)
        await young.until(lambda o: len(o.tokens) > 0)
        assert old.completed is None
        await asyncio.gather(old.end(), young.end())
    assert young.tokens == plain([9, 9], GREEDY)


# --- speculation ------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
async def test_steps_are_saved_and_text_is_the_same_when_drafts_are_right(
    sampling: SamplingParams,
) -> None:
    drafter = ScriptedSpeculator(Drafting(Clairvoyant()))
    engine = ToyEngine(vocab_size=VOCAB, step_s=0.02)
    async with speculator(drafter) as address, verifier_rig(engine, speculators=[address]) as rig:
        await rig.speculators(1)
        outcome = await rig.router.run(PROMPT, sampling, noise_key=3)
    assert outcome.tokens == plain(PROMPT, sampling, 3)
    assert outcome.completed is not None
    told = outcome.completed.usage
    assert outcome.cost == Cost(told.steps, told.drafted, told.accepted)
    usage = outcome.completed.usage
    assert usage.steps <= 10  # 24 tokens: the first plainly, then up to five per step
    assert usage.accepted >= 24 - usage.steps
    assert usage.accepted_by_depth[0] <= usage.offered_by_depth[0]


async def test_metrics_tell_what_was_waited_for_planned_and_gained_when_trees_come() -> None:
    drafter = ScriptedSpeculator(Drafting(Clairvoyant()))
    engine = ToyEngine(vocab_size=VOCAB, step_s=0.02)
    async with speculator(drafter) as address, verifier_rig(engine, speculators=[address]) as rig:
        await rig.speculators(1)
        outcome = await rig.router.run(PROMPT, GREEDY)
        value = rig.verifier.metrics.registry.get_sample_value
        seen = {
            name: value(f"treecast_verifier_{name}") or 0.0
            for name in (
                "step_tokens_count",
                "step_tokens_sum",
                "trees_total",
                "plan_nodes_at_hand_total",
                "plan_nodes_granted_total",
                "plan_predicted_tokens_total",
                "draft_wait_seconds_count",
            )
        }
        goodput = value("treecast_verifier_goodput_tokens_per_second")
    assert outcome.completed is not None
    usage = outcome.completed.usage
    assert (seen["step_tokens_count"], seen["step_tokens_sum"]) == (usage.steps, 24)
    assert seen["trees_total"] > 0
    assert seen["plan_nodes_granted_total"] == usage.drafted > 0
    assert seen["plan_nodes_at_hand_total"] >= usage.drafted
    assert 0 < seen["plan_predicted_tokens_total"] <= usage.drafted
    assert 0 < seen["draft_wait_seconds_count"] <= usage.steps
    assert goodput == pytest.approx(rig.verifier.assignments.tokens_per_s)


def wrong(handle: int, text: list[int], future: list[int]) -> SpeculatorFrame:
    return Draft(handle, len(text), TokenTree.chain([(t + 1) % VOCAB for t in future]))


def ahead(handle: int, text: list[int], future: list[int]) -> SpeculatorFrame:
    return Draft(handle, len(text) + 7, TokenTree.chain(future))


def unknown_token(handle: int, text: list[int], future: list[int]) -> SpeculatorFrame:
    return Draft(handle, len(text), TokenTree.chain([VOCAB + 5]))


def too_deep(handle: int, text: list[int], future: list[int]) -> SpeculatorFrame:
    return Draft(handle, len(text), TokenTree.chain([1] * 40))


def too_wide(handle: int, text: list[int], future: list[int]) -> SpeculatorFrame:
    # Three levels of distinct siblings: more nodes than the cap.
    tree = TokenTree()
    for token in range(VOCAB):
        top = tree.add(token, -1)
        for child in range(3):
            tree.add(child, top)
    return Draft(handle, len(text), tree)


def grouped(handle: int, text: list[int], future: list[int]) -> SpeculatorFrame:
    """Wrong tokens that pass for draws, which no law but mss may take."""
    wrong = tuple(token for token in range(9) if token != future[0])
    tree = TokenTree()
    tree.draw(ROOT, Draws(Proposal.IID, wrong, (1 / len(wrong),) * len(wrong), wrong))
    return Draft(handle, len(text), tree)


def no_session(handle: int, text: list[int], future: list[int]) -> SpeculatorFrame:
    return Draft(handle + 1000, len(text), TokenTree.chain(future))


def refusal(handle: int, text: list[int], future: list[int]) -> SpeculatorFrame:
    return Refused(handle, "no room")


@pytest.mark.parametrize(
    "make", [wrong, ahead, unknown_token, too_deep, too_wide, grouped, no_session, refusal]
)
async def test_text_is_the_same_when_a_speculator_misbehaves(make: Clairvoyant) -> None:
    bad = ScriptedSpeculator(Drafting(make))
    async with speculator(bad) as address, verifier_rig(speculators=[address]) as rig:
        await rig.speculators(1)
        outcomes = await asyncio.gather(
            rig.router.run(PROMPT, GREEDY), rig.router.run([1, 2], SAMPLED, noise_key=5)
        )
        await rig.idle()
        assert rig.engine.usage.used == 0
    assert [o.tokens for o in outcomes] == [plain(PROMPT, GREEDY), plain([1, 2], SAMPLED, 5)]


async def test_rounds_are_told_when_a_speculator_names_no_proposers() -> None:
    """Its nodes have none, so they are malformed, and not for routers to stumble over."""
    nameless = ScriptedSpeculator(Drafting(Clairvoyant()), proposers=())
    async with speculator(nameless) as address, verifier_rig(speculators=[address]) as rig:
        await rig.speculators(1)
        outcome = await rig.router.run(PROMPT, GREEDY, report_rounds=True)
    assert outcome.error is None
    assert outcome.tokens == plain(PROMPT, GREEDY)


async def test_draws_crowd_nobody_out_when_the_law_is_replay() -> None:
    honest = ScriptedSpeculator(Drafting(Clairvoyant()), "honest")
    hostile = ScriptedSpeculator(Drafting(grouped), "hostile")  # type: ignore[arg-type]
    settings = {"planner": "full", "speculators_per_session": 2}
    async with (
        speculator(honest) as one,
        speculator(hostile) as other,
        verifier_rig(speculators=[one, other], **settings) as rig,
    ):
        await rig.speculators(2)
        outcome = await rig.router.run(PROMPT, GREEDY)
        assert rig.verifier.metrics.trees.bad_frames._value.get() == 1
    assert outcome.completed is not None
    assert outcome.completed.usage.accepted >= 16  # of 24 tokens, four in five from a draft


async def test_a_late_tree_is_used_when_its_path_was_committed() -> None:
    """The speculator always answers for the text as it was one commit ago."""
    late: dict[int, tuple[int, list[int]]] = {}

    def remember(handle: int, text: list[int], future: list[int]) -> SpeculatorFrame:
        base, old = late.get(handle, (len(text), future))
        late[handle] = (len(text), future)
        return Draft(handle, base, TokenTree.chain(old))

    drafter = ScriptedSpeculator(Drafting(remember))
    engine = ToyEngine(vocab_size=VOCAB, step_s=0.02)
    async with speculator(drafter) as address, verifier_rig(engine, speculators=[address]) as rig:
        await rig.speculators(1)
        outcome = await rig.router.run(PROMPT, GREEDY)
        hits = rig.verifier.metrics.trees.run_ahead_hits._value.get()
    assert outcome.tokens == plain(PROMPT, GREEDY)
    assert outcome.completed is not None
    assert hits > 0
    assert outcome.completed.usage.accepted > 0


async def test_session_is_sent_anew_when_a_speculator_asks() -> None:
    asked: list[int] = []

    def lose_track(handle: int, text: list[int], future: list[int]) -> SpeculatorFrame:
        if len(asked) < 2:
            asked.append(handle)
            return NeedSync(handle)
        return Draft(handle, len(text), TokenTree.chain(future))

    drafter = ScriptedSpeculator(Drafting(lose_track))
    engine = ToyEngine(vocab_size=VOCAB, step_s=0.01)
    async with speculator(drafter) as address, verifier_rig(engine, speculators=[address]) as rig:
        await rig.speculators(1)
        outcome = await rig.router.run(PROMPT, GREEDY)
    attaches = [frame for frame in drafter.frames if isinstance(frame, Attach)]
    assert len(attaches) == 3
    assert list(attaches[-1].tokens) == [*PROMPT, *outcome.tokens][: len(attaches[-1].tokens)]
    assert outcome.tokens == plain(PROMPT, GREEDY)


async def test_commits_tell_the_speculator_the_whole_text() -> None:
    drafter = ScriptedSpeculator(Drafting(Clairvoyant()))
    async with speculator(drafter) as address, verifier_rig(speculators=[address]) as rig:
        await rig.speculators(1)
        outcome = await rig.router.run(PROMPT, GREEDY)
        async with asyncio.timeout(5):
            while not any(isinstance(frame, Detach) for frame in drafter.frames):
                drafter.got.clear()
                await drafter.got.wait()
    text: list[int] = []
    for frame in drafter.frames:
        if isinstance(frame, Attach):
            text = list(frame.tokens)
        elif isinstance(frame, Commit):
            assert frame.from_len == len(text)
            text += frame.tokens
    assert text == [*PROMPT, *outcome.tokens][: len(text)]
    assert len(text) > len(PROMPT)


async def test_no_tree_is_asked_for_when_a_request_decodes_plainly() -> None:
    drafter = ScriptedSpeculator(Drafting(Clairvoyant()))
    async with speculator(drafter) as address, verifier_rig(speculators=[address]) as rig:
        await rig.speculators(1)
        outcome = await rig.router.run(PROMPT, GREEDY, speculation=SpeculationParams(max_nodes=0))
        assert drafter.frames == []
    assert outcome.completed is not None
    assert outcome.completed.usage.drafted == 0


@pytest.mark.parametrize(("make", "useful"), [(wrong, False), (Clairvoyant(), True)])
async def test_a_speculator_on_our_cores_sits_out_commits_when_it_is_of_no_use(
    make: Clairvoyant, useful: bool
) -> None:
    drafter = ScriptedSpeculator(Drafting(make), shares_cores=True)
    # A step is long beside what a busy machine adds to a draft.
    engine = ToyEngine(vocab_size=VOCAB, step_s=0.02)
    sampling = SamplingParams(temperature=0, max_tokens=240)
    async with speculator(drafter) as address, verifier_rig(engine, speculators=[address]) as rig:
        await rig.speculators(1)
        outcome = await rig.router.run(PROMPT, sampling)
    assert outcome.tokens == plain(PROMPT, sampling)
    commits = [frame for frame in drafter.frames if isinstance(frame, Commit)]
    late = [frame for frame in commits if frame.from_len >= len(PROMPT) + 120]
    num_asked = sum(frame.node_budget > 0 for frame in late)
    if useful:
        assert num_asked > 0.4 * len(late)
    else:  # a token a step; commits that ask for nothing come together
        assert 0 < num_asked < 0.3 * 120
        assert len(late) < 60


class Late(ScriptedSpeculator):
    """Answers when a wait for it is over."""

    delay_s = 0.03

    def received(self, link: Link[SpeculatorFrame, VerifierFrame], frame: VerifierFrame) -> None:
        self.frames.append(frame)
        for answer in self.script(frame):
            asyncio.get_running_loop().call_later(self.delay_s, link.send, answer)


@pytest.mark.parametrize("shares_cores", [True, False])
async def test_a_speculator_that_is_always_late_is_not_waited_for_for_ever(
    shares_cores: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_vain, count = [], Speculation.waited_in_vain
    monkeypatch.setattr(
        Speculation, "waited_in_vain", lambda self, *args: in_vain.append(count(self, *args))
    )
    drafter = Late(Drafting(wrong), shares_cores=shares_cores)
    engine = ToyEngine(vocab_size=VOCAB, step_s=0.02)
    sampling = SamplingParams(temperature=0, max_tokens=240)
    async with speculator(drafter) as address, verifier_rig(engine, speculators=[address]) as rig:
        await rig.speculators(1)
        outcome = await rig.router.run(PROMPT, sampling)
    assert outcome.tokens == plain(PROMPT, sampling)
    assert 0 < len(in_vain) < 40  # of 240 steps


async def test_no_tree_is_asked_for_when_the_last_token_is_all_that_is_left() -> None:
    drafter = ScriptedSpeculator(Drafting(Clairvoyant()))
    two = SamplingParams(temperature=0, max_tokens=2)
    async with speculator(drafter) as address, verifier_rig(speculators=[address]) as rig:
        await rig.speculators(1)
        outcomes = [await rig.router.run(PROMPT, two) for _ in range(3)]
        gain = next(iter(rig.verifier.assignments._speculators.values())).pace.gain
    assert [outcome.tokens for outcome in outcomes] == [plain(PROMPT, two)] * 3
    commits = [frame for frame in drafter.frames if isinstance(frame, Commit)]
    assert all(frame.node_budget == 0 for frame in commits)
    assert (gain.alone, gain.added) == (2.0, 1.0)  # steps without room say nothing


async def test_a_speculator_that_asks_for_the_text_again_and_again_is_let_go() -> None:
    drafter = ScriptedSpeculator(
        lambda frame: [NeedSync(frame.handle)] if isinstance(frame, Attach) else []
    )
    engine = ToyEngine(vocab_size=VOCAB, step_s=0.1)
    async with speculator(drafter) as address, verifier_rig(engine, speculators=[address]) as rig:
        await rig.speculators(1)
        outcome = await rig.router.run(PROMPT, SamplingParams(temperature=0, max_tokens=4))
    assert outcome.tokens == plain(PROMPT, SamplingParams(temperature=0, max_tokens=4))
    kinds = [type(frame) for frame in drafter.frames]
    assert kinds == [*[Attach] * MOST_SYNCS, Detach]


async def test_a_refusal_is_answered_so_that_no_session_stays_behind() -> None:
    """A newer one of the same request may have been taken meanwhile."""
    drafter = ScriptedSpeculator(Drafting(refusal))
    engine = ToyEngine(vocab_size=VOCAB, step_s=0.05)
    async with speculator(drafter) as address, verifier_rig(engine, speculators=[address]) as rig:
        await rig.speculators(1)
        await rig.router.run(PROMPT, SamplingParams(temperature=0, max_tokens=4))
    assert [type(frame) for frame in drafter.frames] == [Attach, Detach]


async def test_decoding_goes_on_when_the_speculator_dies() -> None:
    drafter = ScriptedSpeculator(Drafting(Clairvoyant()))
    engine = ToyEngine(vocab_size=VOCAB, step_s=0.01)
    sampling = SamplingParams(temperature=0, max_tokens=100)
    async with verifier_rig(engine, max_nodes=2) as rig:
        async with speculator(drafter) as address:
            rig.verifier._speculators.follow((Entry(address),))
            await rig.speculators(1)
            _, outcome = rig.router.start(PROMPT, sampling)
            await outcome.until(lambda o: len(o.tokens) > 5)
        await outcome.end()
        await rig.speculators(0)
    assert outcome.tokens == plain(PROMPT, sampling)


async def test_trees_are_waited_for_while_a_sibling_waits_for_a_long_prompt() -> None:
    """300 tokens take 28 steps; the other request's 48 take 11, were every tree waited for."""
    drafter = ScriptedSpeculator(Drafting(Clairvoyant()))
    prompt, engine = [4] * 300, ToyEngine(vocab_size=VOCAB, step_s=0.002)
    settings = {"planner": "full", "max_rows": 16, "max_running": 8}
    async with (
        speculator(drafter) as address,
        verifier_rig(engine, speculators=[address], **settings) as rig,
    ):
        await rig.speculators(1)
        _, outcome = rig.router.start(PROMPT, SamplingParams(temperature=0, max_tokens=48))
        await outcome.until(lambda o: len(o.tokens) > 0)
        siblings = [rig.router.start(prompt, SAMPLED, session=SESSION)[1] for _ in range(2)]
        await outcome.end()
        assert not any(sibling.tokens for sibling in siblings)
        await asyncio.gather(*(sibling.end() for sibling in siblings))
    assert outcome.completed is not None
    assert outcome.completed.usage.steps <= 13
    assert [s.completed.usage.cached_tokens for s in siblings if s.completed] == [0, 299]


# --- ends -------------------------------------------------------------------------------------


async def test_output_is_cut_when_a_stop_token_is_inside_the_accepted_path() -> None:
    expected = plain(PROMPT, GREEDY)
    stop = next(t for i, t in enumerate(expected) if i >= 4 and t not in expected[:i])
    cut = expected.index(stop) + 1
    sampling = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=(stop,))
    drafter = ScriptedSpeculator(Drafting(Clairvoyant()))
    engine = ToyEngine(vocab_size=VOCAB, step_s=0.01)
    async with speculator(drafter) as address, verifier_rig(engine, speculators=[address]) as rig:
        await rig.speculators(1)
        outcome = await rig.router.run(PROMPT, sampling)
        await rig.idle()
        assert rig.engine.usage.used == 0
    assert outcome.tokens == expected[:cut]
    assert outcome.completed is not None
    assert outcome.completed.finish is FinishReason.STOP_TOKEN


@pytest.mark.parametrize("ignore_eos", [False, True])
async def test_eos_ends_the_output_unless_it_is_ignored(ignore_eos: bool) -> None:
    eos = plain(PROMPT, GREEDY)[3]
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=ignore_eos)
    async with verifier_rig(ToyEngine(vocab_size=VOCAB, eos_token_ids=[eos])) as rig:
        outcome = await rig.router.run(PROMPT, sampling)
    assert len(outcome.tokens) == (24 if ignore_eos else plain(PROMPT, GREEDY).index(eos) + 1)


async def test_pages_are_free_soon_when_a_request_is_cancelled() -> None:
    async with verifier_rig(ToyEngine(vocab_size=VOCAB, step_s=0.005)) as rig:
        handle, outcome = rig.router.start(PROMPT, SamplingParams(temperature=0, max_tokens=900))
        await outcome.until(lambda o: len(o.tokens) > 2)
        assert rig.engine.usage.used > 0
        rig.router.cancel(handle)
        await outcome.end()
        assert outcome.completed is not None
        assert outcome.completed.finish is FinishReason.CANCELLED
        assert rig.engine.usage.used == 0


async def test_pages_are_free_when_the_router_vanishes() -> None:
    async with verifier_rig(ToyEngine(vocab_size=VOCAB, step_s=0.005)) as rig:
        _, outcome = rig.router.start(PROMPT, SamplingParams(temperature=0, max_tokens=900))
        await outcome.until(lambda o: len(o.tokens) > 2)
        await rig.router.dialer.close()
        await rig.idle()
        assert rig.engine.usage.used == 0


async def test_output_is_cut_when_the_deadline_passes() -> None:
    async with verifier_rig(ToyEngine(vocab_size=VOCAB, step_s=0.01)) as rig:
        sampling = SamplingParams(temperature=0, max_tokens=900)
        outcome = await rig.router.run(PROMPT, sampling, deadline_ms=150)
    assert outcome.completed is not None
    assert outcome.completed.finish is FinishReason.DEADLINE
    assert outcome.tokens == plain(PROMPT, sampling)[: len(outcome.tokens)]


async def test_requests_fail_and_others_go_on_when_a_step_breaks() -> None:
    broken = threading.Event()

    def explode(segments: Sequence[Segment]) -> None:
        if broken.is_set():
            broken.clear()
            raise RuntimeError("device lost")

    async with verifier_rig(ToyEngine(vocab_size=VOCAB, step_s=0.005, on_forward=explode)) as rig:
        _, outcome = rig.router.start(PROMPT, SamplingParams(temperature=0, max_tokens=900))
        await outcome.until(lambda o: len(o.tokens) > 2)
        broken.set()
        await outcome.end()
        assert str(outcome.error) == "the step failed; see the verifier's log"
        assert rig.engine.usage.used == 0
        assert (await rig.router.run(PROMPT, GREEDY)).tokens == plain(PROMPT, GREEDY)


async def test_streams_end_and_the_process_is_told_to_stop_when_the_step_loop_breaks() -> None:
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    async with verifier_rig() as rig:
        rig.verifier.steps.sessions.expire = None  # type: ignore[assignment, method-assign]
        rig.router.start(PROMPT, GREEDY)
        async with asyncio.timeout(10):
            await told.wait()
            while rig.router.open.is_set():
                await asyncio.sleep(0.01)
            with pytest.raises(TypeError, match="not callable"):
                await rig.verifier.drain()
    asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)


# --- sessions ---------------------------------------------------------------------------------

SESSION = SessionKey("tenant", "s1", epoch=1)


async def test_second_turn_computes_only_what_is_new() -> None:
    async with verifier_rig() as rig:
        first = await rig.router.run(PROMPT, GREEDY, session=SESSION)
        await rig.idle()
        prompt = [*PROMPT, *first.tokens, 8, 9]
        before = rig.engine.num_rows
        second = await rig.router.run(prompt, GREEDY, session=SESSION)
        rows = rig.engine.num_rows - before
    assert second.tokens == plain(prompt, GREEDY)
    assert second.completed is not None
    assert second.completed.usage.cached_tokens == len(PROMPT) + 23
    assert rows == 3 + 23  # the last output token and two new ones, then a root per step


async def test_retained_prefix_is_cut_when_the_next_prompt_differs() -> None:
    async with verifier_rig() as rig:
        await rig.router.run(PROMPT, GREEDY, session=SESSION)
        await rig.idle()
        second = await rig.router.run([5, 6, 50, 51], GREEDY, session=SESSION)
    assert second.tokens == plain([5, 6, 50, 51], GREEDY)
    assert second.completed is not None
    assert second.completed.usage.cached_tokens == 2


async def test_samples_share_the_prompts_pages() -> None:
    prompt = [token % VOCAB for token in range(200)]
    async with verifier_rig(ToyEngine(vocab_size=VOCAB, step_s=0.002)) as rig:
        before = rig.engine.num_rows
        outcomes = await asyncio.gather(
            *(rig.router.run(prompt, SAMPLED, noise_key=k, session=SESSION) for k in range(3))
        )
        await rig.idle()
        assert rig.engine.num_rows - before == 200 + 2 + 3 * 23  # one prompt, two roots, decoding
    assert [o.tokens for o in outcomes] == [plain(prompt, SAMPLED, k) for k in range(3)]
    cached = sorted(o.completed.usage.cached_tokens for o in outcomes if o.completed)
    assert cached == [0, 199, 199]


async def test_only_one_copy_is_retained_when_samples_finish() -> None:
    async with verifier_rig() as rig:
        await asyncio.gather(
            *(rig.router.run(PROMPT, SAMPLED, noise_key=k, session=SESSION) for k in range(3))
        )
        await rig.idle()
        assert rig.engine.usage.used == 1
        rig.router.link.send(Forget(SESSION))
        await rig.router.run([1], GREEDY)
        await rig.idle()
        assert rig.engine.usage.used == 0


async def test_nothing_is_retained_when_samples_are_cancelled_and_forgotten() -> None:
    async with verifier_rig(ToyEngine(vocab_size=VOCAB, step_s=0.005)) as rig:
        long = SamplingParams(max_tokens=500)
        started = [rig.router.start(PROMPT, long, noise_key=k, session=SESSION) for k in (1, 2)]
        await started[1][1].until(lambda o: len(o.tokens) > 1)
        for handle, _ in started:
            rig.router.cancel(handle)
        rig.router.link.send(Forget(SESSION))
        await asyncio.gather(*(outcome.end() for _, outcome in started))
        await rig.router.run([1], GREEDY)
        await rig.idle()
        assert rig.engine.usage.used == 0


async def test_nothing_is_retained_when_a_session_is_forgotten_before_its_request_ends() -> None:
    async with verifier_rig(ToyEngine(vocab_size=VOCAB, step_s=0.005)) as rig:
        long = SamplingParams(max_tokens=50)
        _, running = rig.router.start(PROMPT, long, session=SESSION)
        await running.until(lambda o: len(o.tokens) > 1)
        rig.router.link.send(Forget(SESSION))
        await running.end()
        await rig.idle()
        assert len(running.tokens) == 50
        assert rig.engine.usage.used == 0


async def test_a_new_request_is_retained_when_a_forgotten_one_outlives_it() -> None:
    async with verifier_rig(ToyEngine(vocab_size=VOCAB, step_s=0.005)) as rig:
        _, old = rig.router.start(PROMPT, SamplingParams(max_tokens=500), session=SESSION)
        await old.until(lambda o: len(o.tokens) > 1)
        rig.router.link.send(Forget(SESSION))
        await rig.router.run(PROMPT, GREEDY, session=SESSION)
        await old.end()
        await rig.idle()
        assert len(rig.verifier.steps.sessions) == 1
        assert rig.engine.usage.used == 1


async def test_idle_sessions_stay_when_evicting_them_would_not_help() -> None:
    engine = ToyEngine(vocab_size=VOCAB, pool_tokens=512, step_s=0.005)
    async with verifier_rig(engine) as rig:
        await rig.router.run(PROMPT, GREEDY, session=SESSION)
        _, running = rig.router.start([1], SamplingParams(temperature=0, max_tokens=200))
        await running.until(lambda o: len(o.tokens) > 1)
        _, big = rig.router.start([2], SamplingParams(temperature=0, max_tokens=400))
        await running.until(lambda o: len(o.tokens) > 20)
        assert len(rig.verifier.steps.sessions) == 1
        await asyncio.gather(running.end(), big.end())
    assert big.tokens == plain([2], SamplingParams(temperature=0, max_tokens=400))


async def test_idle_sessions_are_evicted_when_pages_run_out() -> None:
    async with verifier_rig(ToyEngine(vocab_size=VOCAB, pool_tokens=512)) as rig:
        for name in ("a", "b", "c", "d", "e", "f", "g", "h", "i"):
            prompt = [ord(name) % VOCAB, *range(60)]
            outcome = await rig.router.run(prompt, GREEDY, session=SessionKey("t", name, 1))
            assert outcome.tokens == plain(prompt, GREEDY)
        await rig.idle()
        usage = rig.engine.usage
        assert usage.free + usage.used == usage.total == 8
        evicted = rig.verifier.metrics.registry.get_sample_value(
            "treecast_verifier_evicted_sessions_total", {"why": "pressure"}
        )
        assert evicted == 9 - len(rig.verifier.steps.sessions) > 0


async def test_older_lease_is_refused() -> None:
    async with verifier_rig() as rig:
        await rig.router.run(PROMPT, GREEDY, session=SessionKey("t", "s", 7))
        outcome = await rig.router.run(PROMPT, GREEDY, session=SessionKey("t", "s", 6))
    assert isinstance(outcome.error, StaleLease)
    assert str(outcome.error) == "session lease has epoch 6; 7 has been seen"


# --- resuming and bad input -------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
async def test_text_goes_on_unchanged_when_output_was_committed_elsewhere(
    sampling: SamplingParams,
) -> None:
    expected = plain(PROMPT, sampling, 9)
    async with verifier_rig() as rig:
        rig.router.offsets = {1: 10}
        outcome = await rig.router.run(
            PROMPT, sampling, noise_key=9, committed=tuple(expected[:10])
        )
    assert outcome.tokens == expected[10:]


@pytest.mark.parametrize("count", [300, 400])
async def test_text_goes_on_when_much_was_committed_elsewhere(count: int) -> None:
    """Its stops are looked for on a thread; the others go on meanwhile."""
    sampling = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    expected = plain(PROMPT, sampling)
    async with verifier_rig() as rig:
        rig.router.offsets = {1: count}
        long = rig.router.run(PROMPT, sampling, committed=tuple(expected[:count]))
        outcome, other = await asyncio.gather(long, rig.router.run([1, 2], GREEDY))
    assert outcome.tokens == expected[count:]
    assert outcome.completed.finish is FinishReason.LENGTH
    assert other.tokens == plain([1, 2], GREEDY)


async def test_request_is_done_at_once_when_its_committed_output_was_complete() -> None:
    expected = tuple(plain(PROMPT, GREEDY))
    async with verifier_rig() as rig:
        before = rig.engine.num_rows
        outcome = await rig.router.run(PROMPT, GREEDY, committed=expected)
        assert rig.engine.num_rows == before
    assert outcome.tokens == []
    assert outcome.completed is not None
    assert outcome.completed.finish is FinishReason.LENGTH


BAD = [
    ({"prompt": []}, InvalidRequest, "prompt is empty"),
    ({"prompt": [97]}, InvalidRequest, "token id 97 is unknown; the vocabulary has 97"),
    (
        {"prompt": [1] * 1010},
        PromptTooLong,
        "prompt has 1010 tokens and max_tokens is 24; the limit is 1024 together",
    ),
    (
        {"prompt": [1], "sampling": SamplingParams(logit_bias={300: 1.0})},
        InvalidRequest,
        "token id in logit_bias is 300; allowed: below the vocabulary size 97",
    ),
    (
        {"prompt": [1], "sampling": SamplingParams(regex="a+")},
        InvalidRequest,
        "regex cannot be kept here: it needs the package llguidance, and a model with a tokenizer "
        "and an end-of-sequence token",
    ),
    (
        {"prompt": [1], "speculation": SpeculationParams.of(Law.MSS)},
        NotServed,
        "law mss is not served; this verifier has replay",
    ),
]


@pytest.mark.parametrize(("fields", "kind", "message"), BAD)
async def test_bad_request_is_refused_by_name(
    fields: dict[str, object], kind: type[Exception], message: str
) -> None:
    async with verifier_rig(ToyEngine(vocab_size=VOCAB, step_s=0.002)) as rig:
        _, neighbour = rig.router.start(PROMPT, GREEDY)
        outcome = await rig.router.run(**({"sampling": GREEDY} | fields))  # type: ignore[arg-type]
        await neighbour.end()
        await rig.idle()
        assert rig.engine.usage.used == 0
    assert type(outcome.error) is kind
    assert str(outcome.error) == message
    assert neighbour.tokens == plain(PROMPT, GREEDY)


async def test_others_go_on_when_the_walk_of_one_request_breaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = SamplingParams(temperature=0, max_tokens=24, logit_bias={5: 1.0})
    pick = Picker.pick

    def breaking(self: Picker, logits: NDArray[np.float32]) -> int:
        if self.sampling.logit_bias:
            raise RuntimeError("a bug")
        return pick(self, logits)

    monkeypatch.setattr(Picker, "pick", breaking)
    async with verifier_rig(ToyEngine(vocab_size=VOCAB, step_s=0.005)) as rig:
        _, neighbour = rig.router.start(PROMPT, GREEDY)
        outcome = await rig.router.run(PROMPT, broken)
        await neighbour.end()
    assert str(outcome.error) == "internal error"
    assert neighbour.tokens == plain(PROMPT, GREEDY)


async def test_long_prompt_is_cut_at_its_front_when_asked_to() -> None:
    prompt = [token % VOCAB for token in range(1010)]
    async with verifier_rig() as rig:
        outcome = await rig.router.run(prompt, GREEDY, truncate_prompt=True)
    assert outcome.tokens == plain(prompt[-1000:], GREEDY)


async def test_request_is_refused_when_it_can_never_fit_the_pool() -> None:
    async with verifier_rig(ToyEngine(vocab_size=VOCAB, pool_tokens=256)) as rig:
        outcome = await rig.router.run([1] * 250, GREEDY)
        assert str(outcome.error) == (
            "the request needs room for 274 positions; the KV pool has 256"
        )
        assert (await rig.router.run(PROMPT, GREEDY)).tokens == plain(PROMPT, GREEDY)
    assert isinstance(outcome.error, PromptTooLong)


async def test_request_waits_when_pages_are_taken_and_ends_at_its_deadline() -> None:
    engine = ToyEngine(vocab_size=VOCAB, pool_tokens=256, step_s=0.005)
    async with verifier_rig(engine) as rig:
        _, first = rig.router.start(PROMPT, SamplingParams(temperature=0, max_tokens=150))
        await first.until(lambda o: len(o.tokens) > 1)
        _, second = rig.router.start([1, 2], SamplingParams(temperature=0, max_tokens=150))
        await second.until(lambda o: len(o.tokens) > 1)
        hurried = await rig.router.run([3] * 100, GREEDY, deadline_ms=50)
        await asyncio.gather(first.end(), second.end())
    assert isinstance(hurried.error, DeadlineExceeded)
    assert str(hurried.error) == (
        "deadline of 50 ms passed while the request waited for room; "
        "2 of 32 requests are running, 0 of 4 KV pages are free"
    )
    assert second.tokens == plain([1, 2], SamplingParams(temperature=0, max_tokens=150))


async def test_request_is_refused_when_too_many_wait() -> None:
    engine = ToyEngine(vocab_size=VOCAB, step_s=0.02)
    async with verifier_rig(engine, max_running=1, max_waiting=1) as rig:
        started = [rig.router.start(PROMPT, GREEDY)[1] for _ in range(4)]
        await asyncio.gather(*(outcome.end() for outcome in started))
    refused = [outcome for outcome in started if outcome.error]
    assert refused
    assert all(isinstance(outcome.error, Overloaded) for outcome in refused)
    assert "the limits are 1 and 1" in str(refused[0].error)


async def test_burst_is_taken_when_there_is_a_slot_for_each_and_none_may_wait() -> None:
    async with verifier_rig(max_running=8, max_waiting=0) as rig:
        started = [rig.router.start([token], GREEDY)[1] for token in range(8)]
        await asyncio.gather(*(outcome.end() for outcome in started))
    assert [outcome.tokens for outcome in started] == [plain([token], GREEDY) for token in range(8)]


# --- logs -------------------------------------------------------------------------------------


async def test_logs_name_the_request_when_it_ends_or_is_refused() -> None:
    with structlog.testing.capture_logs() as logs:
        async with verifier_rig() as rig:
            await rig.router.run(PROMPT, GREEDY, request_id="one")
            await rig.router.run([], GREEDY, request_id="two")
    told = [entry for entry in logs if "request_id" in entry]
    assert told == [
        {
            "event": "request.ended",
            "log_level": "info",
            "request_id": "one",
            "num_tokens": 24,
            "steps": 24,
        },
        {
            "event": "request.refused",
            "log_level": "info",
            "request_id": "two",
            "why": "prompt is empty",
        },
    ]


# --- tokenizer --------------------------------------------------------------------------------


async def test_tokenizer_is_handed_out_when_it_is_larger_than_other_messages() -> None:
    definition = byte_tokenizer().to_str().encode() + b" " * (MAX_MESSAGE_BYTES + 1)
    files = TokenizerFiles(definition, "template", {"bos_token": "<s>"})
    async with (
        verifier_rig(tokenizer=files) as rig,
        open_channel(rig.address, max_message_bytes=MAX_ANSWER_BYTES) as channel,
    ):
        stub = verifier_pb2_grpc.VerifierServiceStub(channel)
        answer = await stub.GetTokenizer(verifier_pb2.GetTokenizerRequest())
        assert answer.tokenizer_json == definition
        with pytest.raises(grpc.aio.AioRpcError, match="larger than max"):
            await stub.GetTokenizer(verifier_pb2.GetTokenizerRequest(model_revision="x" * 2**23))


def test_verifier_does_not_start_when_no_router_could_fetch_its_tokenizer(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_ANSWER_BYTES)
    with pytest.raises(ModelError) as refusal:
        read_tokenizer(tmp_path)
    assert refusal.value.message == (
        f"{tmp_path}/tokenizer.json has 67108864 bytes; the limit is 66060288"
    )
