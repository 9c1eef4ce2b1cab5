"""Slots, and what is merged in them."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treecast.errors import Overloaded, TreecastError
from treecast.sampling.logprobs import TokenLogprobs
from treecast.sampling.params import SamplingParams
from treecast.tree import TokenTree
from treecast.wire.frames import (
    Attach,
    Cancel,
    Commit,
    Completed,
    Cost,
    Detach,
    Draft,
    Failed,
    FinishReason,
    Forget,
    Heartbeat,
    NeedSync,
    Progress,
    Refused,
    SessionKey,
    Start,
)
from treecast.wire.outbox import Outbox, merge_waiting, slot_key

SAMPLING = SamplingParams(temperature=0)


def attach(*tokens: int) -> Attach:
    return Attach(1, tokens, 1, SAMPLING, 0, 16)


def commit(from_len: int, *tokens: int, budget: int = 16) -> Commit:
    return Commit(1, from_len, tokens, budget)


def progress(from_index: int, *tokens: int) -> Progress:
    return Progress(1, from_index, tokens)


START = Start(1, "r", (1,), SAMPLING, 0)
DONE = Completed(1, FinishReason.LENGTH)
FAILED = Failed(1, TreecastError("x"))
OLD, NEW = (Draft(1, base, TokenTree.chain([base])) for base in (4, 5))


@pytest.mark.parametrize(
    ("sent", "waiting"),
    [
        # Commits concatenate and keep the newest budget.
        ([commit(3, 7), commit(4, 8, 9, budget=2)], [commit(3, 7, 8, 9, budget=2)]),
        # With a gap the later stands alone, so that the receiver asks for an Attach.
        ([commit(3, 7), commit(9, 8)], [commit(9, 8)]),
        ([attach(1, 2), commit(2, 3), commit(3, 4)], [attach(1, 2), commit(2, 3, 4)]),
        # An Attach holds all the text, so it replaces everything.
        ([attach(1), commit(1, 2), attach(1, 2, 3)], [attach(1, 2, 3)]),
        ([commit(1, 2), Detach(1)], [Detach(1)]),
        ([attach(1), commit(1, 2), Detach(1)], [Detach(1)]),
        ([Detach(1), commit(1, 2)], [Detach(1)]),
        ([Detach(1), attach(1)], [attach(1)]),
        # Trees replace.
        ([OLD, NEW], [NEW]),
        ([NeedSync(1), OLD, NEW], [NeedSync(1), NEW]),
        ([OLD, NeedSync(1)], [NeedSync(1)]),
        ([OLD, Refused(1, "full")], [Refused(1, "full")]),
        ([Refused(1, "full"), OLD], [Refused(1, "full")]),
        # Tokens concatenate; the end stays behind them, and there is one end.
        ([progress(0, 5), progress(1, 6)], [progress(0, 5, 6)]),
        ([progress(0, 5), DONE], [progress(0, 5), DONE]),
        ([progress(0, 5), progress(1, 6), FAILED], [progress(0, 5, 6), FAILED]),
        ([DONE, FAILED], [DONE]),
        ([DONE, progress(1, 6)], [DONE]),
        # A request that is started and cancelled still ends with an answer.
        ([START, Cancel(1)], [START, Cancel(1)]),
        ([START, Cancel(1), Cancel(1)], [START, Cancel(1)]),
        ([Heartbeat(1), Heartbeat(2)], [Heartbeat(2)]),
    ],
)
def test_slot_holds_what_is_still_worth_sending_when_frames_wait(
    sent: list[object], waiting: list[object]
) -> None:
    slot: list[object] = []
    for frame in sent:
        slot = merge_waiting(slot, frame)
    assert slot == waiting


def test_tokens_keep_their_logprobs_when_progress_concatenates() -> None:
    one, two = (Progress(1, i, (i,), (TokenLogprobs(-i),), Cost(1, 4, i)) for i in (0, 1))
    assert merge_waiting([one], two) == [
        Progress(1, 0, (0, 1), (TokenLogprobs(0), TokenLogprobs(-1)), Cost(2, 8, 1))
    ]


@pytest.mark.parametrize(
    "later", [progress(3, 6), Progress(1, 1, (6,), (TokenLogprobs(-1.0),))], ids=["gap", "logprobs"]
)
def test_no_token_is_lost_when_progress_does_not_fit(later: Progress) -> None:
    assert merge_waiting([progress(0, 5)], later) == [progress(0, 5), later]


@given(st.lists(st.integers(1, 3), min_size=1, max_size=20), st.integers(1, 20))
@settings(deadline=None)
def test_text_is_the_same_when_taken_at_any_moment(lengths: list[int], taken_every: int) -> None:
    """Whatever is drained when, the receiver reads the same tokens in the same order."""
    numbers = itertools.count()
    slot: list[object] = []
    received: list[int] = []
    for step, length in enumerate(lengths, start=1):
        start = sum(lengths[: step - 1])
        slot = merge_waiting(slot, progress(start, *itertools.islice(numbers, length)))
        assert len(slot) == 1
        if step % taken_every == 0:
            received += [token for frame in slot for token in frame.tokens]  # type: ignore[attr-defined]
            slot = []
    received += [token for frame in slot for token in frame.tokens]  # type: ignore[attr-defined]
    assert received == list(range(sum(lengths)))


async def test_frames_come_out_by_session_when_taken() -> None:
    outbox: Outbox[object] = Outbox()
    outbox.put(2, Commit(2, 5, (1,), 0))
    outbox.put(1, Commit(1, 5, (1,), 0))
    outbox.put(2, Commit(2, 6, (2,), 0))
    assert len(outbox) == 2
    assert await outbox.take() == [Commit(2, 5, (1, 2), 0), Commit(1, 5, (1,), 0)]
    assert len(outbox) == 0


async def test_memory_is_bounded_by_sessions_when_nobody_takes() -> None:
    """Ten thousand steps of four sessions leave four slots of two frames at most."""
    outbox: Outbox[object] = Outbox()
    for handle in range(4):
        outbox.put(handle, Attach(handle, (1,), 1, SAMPLING, 0, 16))
    for step in range(10_000):
        handle = step % 4
        outbox.put(handle, Commit(handle, 1 + step // 4, (7,), 16))
    assert len(outbox) == 4
    frames = await outbox.take()
    assert len(frames) == 8
    assert all(len(f.tokens) == 2500 for f in frames if isinstance(f, Commit))


async def test_put_is_refused_when_too_many_sessions_wait() -> None:
    outbox: Outbox[object] = Outbox(max_slots=2)
    outbox.put(1, Detach(1))
    outbox.put(2, Detach(2))
    outbox.put(2, attach(1))
    with pytest.raises(Overloaded, match="2 sessions wait to be sent; the limit is 2"):
        outbox.put(3, Detach(3))


async def test_take_waits_when_there_is_nothing() -> None:
    outbox: Outbox[object] = Outbox()
    taking = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    assert not taking.done()
    outbox.put(1, Detach(1))
    assert await asyncio.wait_for(taking, 5) == [Detach(1)]


async def test_a_frame_that_may_wait_goes_with_the_next_that_may_not() -> None:
    outbox: Outbox[Commit | Heartbeat] = Outbox()
    taken = asyncio.ensure_future(outbox.take())
    for at in (4, 5, 6):
        outbox.put(1, commit(at, at, budget=0), waits=True)
        await asyncio.sleep(0)
    assert not taken.done()
    outbox.put("Heartbeat", Heartbeat())
    assert await taken == [commit(4, 4, 5, 6, budget=0), Heartbeat()]
    outbox.put(1, commit(7, 7, budget=0), waits=True)
    taken = asyncio.ensure_future(outbox.take())
    await asyncio.wait_for(outbox.sent(), 1)  # it is not due, so nobody waits for it
    assert not taken.done()
    outbox.put(1, commit(8, 8))
    assert await taken == [commit(7, 7, 8)]


async def test_take_is_empty_when_closed() -> None:
    outbox: Outbox[object] = Outbox()
    taking = asyncio.create_task(outbox.take())
    await asyncio.sleep(0)
    outbox.close()
    assert await asyncio.wait_for(taking, 5) == []
    outbox.put(1, Detach(1))
    assert await outbox.take() == []


def test_frames_share_a_slot_when_they_are_of_one_session() -> None:
    key = SessionKey("t", "s", 1)
    assert slot_key(commit(1, 2)) == slot_key(Detach(1)) == 1
    assert slot_key(Forget(key)) == key
    assert slot_key(Heartbeat()) == slot_key(Heartbeat(steps=3))


async def test_sent_is_when_the_taker_has_come_back_and_nothing_waits() -> None:
    outbox: Outbox[Cancel] = Outbox()
    outbox.put(1, Cancel(1))
    sent = asyncio.create_task(outbox.sent())
    assert await outbox.take() == [Cancel(1)]
    await asyncio.sleep(0)
    assert not sent.done()
    taking = asyncio.create_task(outbox.take())
    await asyncio.wait_for(sent, 10)
    outbox.put(1, Cancel(1))
    late = asyncio.create_task(outbox.sent())
    await asyncio.sleep(0)
    assert not late.done()
    outbox.close()
    await asyncio.wait_for(late, 10)
    await taking
