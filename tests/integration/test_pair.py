"""The pair stream over real ports: hellos, frames, silence, replacement, and hostile peers."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import structlog

from treecast.errors import (
    DuplicateRequest,
    InvalidRequest,
    InvalidTree,
    PeerMismatch,
    TreecastError,
    Unavailable,
)
from treecast.sampling.params import Law
from treecast.tree import TokenTree
from treecast.v1 import speculator_pb2 as pb
from treecast.wire.channel import MAX_MESSAGE_BYTES
from treecast.wire.dialer import Dialer, retry_pause_s
from treecast.wire.frames import Attach, Draft, Heartbeat, Hello, NeedSync, Refused, Role
from treecast.wire.greeting import is_hung
from treecast.wire.hop import SPECULATE

from .pair_rig import (
    GREEDY,
    SPECULATOR,
    TIMEOUT_S,
    VERIFIER,
    Recorder,
    attach,
    commit,
    problem_of,
    raw_verifier,
    reluctant_speculator,
    speculator,
    verifier,
)


async def test_frames_cross_both_ways_when_hellos_agree() -> None:
    draft = Draft(1, 3, TokenTree.chain([4, 5]))
    there = Recorder(lambda link, frame: link.send(draft))
    async with speculator(recorder=there) as served, verifier(served.address) as (dialer, here):
        await here.heard("opened speculator-1")
        assert dialer.link is here.links[0]
        assert dialer.problem is None
        dialer.link.send(attach(1, 1, 2, 3))
        await here.heard("received Draft")
        assert here.frames == [draft]
        assert there.frames == [attach(1, 1, 2, 3)]
        assert there.links[0].peer == VERIFIER
        assert here.links[0].peer == SPECULATOR


async def test_both_ends_hear_of_it_when_the_dialer_closes() -> None:
    async with speculator() as served, verifier(served.address) as (dialer, here):
        await here.heard("opened")
        await dialer.close()
        await served.recorder.heard("closed verifier-1")
        assert here.events[-1].startswith("closed speculator-1")
        assert served.acceptor.links == []
        link = here.links[0]
        assert not link.alive
        link.send(attach(1))  # a no-op, not an error


async def test_heartbeats_arrive_when_nothing_else_is_said() -> None:
    beating = iter(range(1, 1000))
    async with speculator() as served:
        recorder = served.recorder
        async with verifier(served.address, heartbeat=lambda: Heartbeat(steps=next(beating))):
            await recorder.until(lambda: len(recorder.beats) >= 3)
            assert [beat.steps for beat in recorder.beats[:3]] == [2, 3, 4]
            assert recorder.links[0].last_heartbeat == recorder.beats[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 32000}, "vocab_size of peer 'verifier-1' is 32000; expected 100"),
        ({"tokenizer_hash": "xyz"}, "tokenizer_hash of peer 'verifier-1' is xyz; expected abc"),
        ({"protocol_version": 2}, "protocol_version of peer 'verifier-1' is 2; expected 1"),
        ({"laws": (Law.MSS,)}, "laws of peer 'verifier-1' is ['mss']; expected ['replay']"),
        ({"role": Role.ROUTER}, "role of peer 'verifier-1' is router; expected verifier"),
    ],
)
async def test_peer_is_refused_by_name_when_it_does_not_fit(
    change: dict[str, Any], message: str
) -> None:
    misfit = dataclasses.replace(VERIFIER, **change)
    async with speculator() as served, verifier(served.address, misfit) as (dialer, here):
        problem = await problem_of(dialer)
        assert type(problem) is PeerMismatch
        assert str(problem) == message
        assert here.events == served.recorder.events == []


async def test_peer_fits_when_it_has_no_vocabulary_of_its_own() -> None:
    bare = dataclasses.replace(SPECULATOR, vocab_size=0, tokenizer_hash="")
    async with speculator(bare) as served, verifier(served.address) as (_, here):
        await here.heard("opened")


def test_dialing_is_slow_when_trying_again_cannot_help() -> None:
    assert retry_pause_s(1, PeerMismatch("x")) >= 7.5
    assert retry_pause_s(1, DuplicateRequest("x")) >= 7.5
    assert 0.05 <= retry_pause_s(0, Unavailable("x")) <= 0.1
    assert 1.0 <= retry_pause_s(50, Unavailable("x")) <= 2.0


async def test_newer_stream_replaces_older_when_the_instance_is_the_same() -> None:
    async with speculator() as served, verifier(served.address) as (first, _):
        recorder = served.recorder
        await recorder.heard("opened")
        async with verifier(served.address) as (second, here):
            await recorder.until(lambda: len(recorder.links) == 2)
            await here.heard("opened")
            why = "stream of instance 'verifier-1' was replaced by a newer one"
            assert recorder.events == [
                "opened verifier-1",
                f"closed verifier-1: {why}",
                "opened verifier-1",
            ]
            assert served.acceptor.links == [recorder.links[1]]
            problem = await problem_of(first)
            assert isinstance(problem, DuplicateRequest)
            assert str(problem) == why
            assert second.link is not None


async def test_neither_replaces_the_other_when_instances_differ() -> None:
    other = dataclasses.replace(VERIFIER, instance_id="verifier-2")
    async with (
        speculator() as served,
        verifier(served.address) as (first, here),
        verifier(served.address, other) as (second, there),
    ):
        await here.heard("opened")
        await there.heard("opened")
        await served.recorder.until(lambda: len(served.recorder.links) == 2)
        assert first.link is not None
        assert second.link is not None


async def test_server_notices_when_a_peer_falls_silent() -> None:
    async with speculator() as served, raw_verifier(served.address) as raw:
        await raw.say(VERIFIER)
        await served.recorder.heard("opened")
        await served.recorder.heard("closed verifier-1: peer was silent for 1.0 s")
        assert type(await raw.end()) is Unavailable


async def test_server_stays_when_a_peer_only_beats() -> None:
    """The control of the test above: six beats take longer than the silence allowed."""
    async with speculator() as served, raw_verifier(served.address) as raw:
        await raw.say(VERIFIER)
        for steps in range(6):
            await asyncio.sleep(0.25)
            await raw.say(Heartbeat(steps=steps))
        await served.recorder.until(lambda: len(served.recorder.beats) == 6)
        assert served.recorder.links[0].alive


REPOSITORY = Path(__file__).parents[2]
FROZEN_PEER = """
import asyncio
from tests.integration.pair_rig import speculator

async def main():
    async with speculator() as served:
        print(served.address, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_dialer_notices_and_returns_when_a_peer_is_stopped_and_continued() -> None:
    """SIGSTOP leaves all sockets open, so only silence tells."""
    peer = await asyncio.create_subprocess_exec(
        sys.executable, "-c", FROZEN_PEER, stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY
    )
    try:
        assert peer.stdout is not None
        async with asyncio.timeout(TIMEOUT_S):
            address = (await peer.stdout.readline()).decode().strip()
        async with verifier(address) as (dialer, here):
            await here.heard("opened")
            peer.send_signal(signal.SIGSTOP)
            await here.heard("closed speculator-1: peer was silent for 1.0 s")
            assert dialer.link is None
            peer.send_signal(signal.SIGCONT)
            await here.until(lambda: len(here.links) == 2)
            assert dialer.link is not None
    finally:
        peer.kill()
        await peer.wait()


async def test_link_survives_when_this_process_stalls() -> None:
    async with speculator() as served, verifier(served.address) as (dialer, here):
        await here.heard("opened")
        time.sleep(1.6)  # noqa: ASYNC251 - the stall itself
        beats = len(here.beats)
        await here.until(lambda: len(here.beats) > beats + 3)
        assert here.links == [dialer.link]


@pytest.mark.parametrize(
    ("age_ms", "predicted_ms", "hung"),
    [
        (0, 0, False),
        (10_000, 20, False),
        (10_001, 20, True),
        (10_001, 1001, False),
        (50_000, 5000, False),
        (50_001, 5000, True),
    ],
)
def test_step_counts_as_hung_when_far_past_its_prediction(
    age_ms: int, predicted_ms: int, hung: bool
) -> None:
    assert is_hung(Heartbeat(step_age_ms=age_ms, step_predicted_ms=predicted_ms)) is hung


async def test_peer_is_left_and_not_reopened_when_its_step_hangs() -> None:
    async with speculator() as served, raw_verifier(served.address) as raw:
        await raw.say(VERIFIER)
        await raw.say(Heartbeat(step_age_ms=13_000, step_predicted_ms=20))
        await served.recorder.heard(
            "closed verifier-1: peer's step has run for 13000 ms; predicted were 20 ms"
        )
        async with raw_verifier(served.address) as again:
            await again.say(VERIFIER, Heartbeat(step_age_ms=13_250, step_predicted_ms=20))
            assert type(await again.end()) is Unavailable
        assert len(served.recorder.links) == 1


async def test_only_its_session_ends_when_a_frame_is_malformed() -> None:
    async with speculator() as served, raw_verifier(served.address) as raw:
        recorder = served.recorder
        message = pb.SpeculateRequest()
        message.frames.add().attach.CopyFrom(pb.Attach(handle=1, tokens=[1], prompt_len=5))
        message.frames.add().attach.CopyFrom(pb.Attach(handle=2, tokens=[100], prompt_len=1))
        message.frames.add().attach.CopyFrom(pb.Attach(handle=3, tokens=[99], prompt_len=1))
        message.frames.add()
        await raw.say(VERIFIER)
        await raw.write(message)
        await raw.say(commit(3, 1, 7))
        await recorder.heard("received Commit 3")
        assert recorder.events[1:] == [
            "failed 1",
            "failed 2",
            "received Attach 3",
            "received Commit 3",
        ]
        assert str(recorder.failures[1]) == "token 0 of attach is 100; the vocabulary has 100"
        assert recorder.links[0].alive


async def test_only_its_session_ends_when_a_tree_is_hostile() -> None:
    """A speculator without bounds: 257 nodes, and a token that nobody has."""
    wide = TokenTree.build(range(257), [-1] * 257)
    answers = [Draft(1, 1, wide), Draft(2, 1, TokenTree.chain([100])), NeedSync(3)]
    there = Recorder(lambda link, frame: [link.send(answer) for answer in answers] and None)
    async with speculator(recorder=there) as served, verifier(served.address) as (dialer, here):
        await here.heard("opened")
        here.links[0].send(attach(1))
        await here.heard("received NeedSync 3")
        assert [(bad.handle, type(bad.cause), str(bad)) for bad in here.failures] == [
            (1, InvalidTree, "tree has 257 nodes; the limit is 256"),
            (2, InvalidTree, "node 0 has token 100; the vocabulary has 100"),
        ]
        assert dialer.link is not None


@pytest.mark.parametrize(
    ("raised", "cause", "message"),
    [
        (InvalidRequest("prompt is empty"), InvalidRequest, "prompt is empty"),
        (KeyError("secret"), TreecastError, "internal error"),
    ],
)
async def test_only_its_session_ends_when_a_handler_raises(
    raised: Exception, cause: type[TreecastError], message: str
) -> None:
    def react(link: Any, frame: Any) -> None:
        if frame.handle == 1:
            raise raised

    there = Recorder(react)
    async with speculator(recorder=there) as served, verifier(served.address) as (_, here):
        await here.heard("opened")
        here.links[0].send(attach(1))
        here.links[0].send(attach(2))
        await there.heard("received Attach 2")
        (failure,) = there.failures
        assert (failure.handle, type(failure.cause), str(failure)) == (1, cause, message)


async def test_message_is_refused_and_the_server_lives_when_it_is_over_the_cap() -> None:
    huge = pb.SpeculateRequest()
    huge.frames.add().attach.sampling.stop.append("x" * (MAX_MESSAGE_BYTES + 1))
    async with speculator() as served, verifier(served.address) as (dialer, here):
        await here.heard("opened")
        async with raw_verifier(served.address) as raw:
            await raw.say(dataclasses.replace(VERIFIER, instance_id="hostile"))
            await raw.hear()
            await raw.write(huge)
            error = await raw.end()
        assert type(error) is InvalidRequest
        assert "larger than max (" in str(error)
        assert str(MAX_MESSAGE_BYTES) in str(error)
        here.links[0].send(attach(1))
        await served.recorder.heard("received Attach 1")
        assert here.links == [dialer.link]


async def test_only_its_session_ends_when_a_frame_is_too_large_to_send() -> None:
    bare = dataclasses.replace(VERIFIER, vocab_size=0)
    free = dataclasses.replace(SPECULATOR, vocab_size=0)
    async with speculator(free) as served, verifier(served.address, bare) as (dialer, here):
        await here.heard("opened")
        link = here.links[0]
        link.send(attach(1, *[2**31] * 900_000))  # five bytes a token
        link.send(attach(2))
        await served.recorder.heard("received Attach 2")
        (failure,) = here.failures
        assert failure.handle == 1
        assert str(failure).endswith("bytes; the limit is 4194304")
        assert here.links == [dialer.link]


async def test_only_its_session_ends_when_a_frame_cannot_be_encoded() -> None:
    async with speculator() as served, verifier(served.address) as (_, here):
        await here.heard("opened")
        here.links[0].send(attach(1, -5))
        here.links[0].send(attach(2))
        await served.recorder.heard("received Attach 2")
        assert [failure.handle for failure in here.failures] == [1]


async def test_messages_are_split_when_together_they_exceed_the_cap() -> None:
    """Four prompts of 1.5 MB each are sent at one moment."""
    bare = dataclasses.replace(VERIFIER, vocab_size=0)
    free = dataclasses.replace(SPECULATOR, vocab_size=0)
    async with speculator(free) as served, verifier(served.address, bare) as (dialer, here):
        await here.heard("opened")
        for handle in range(4):
            here.links[0].send(attach(handle, *[2**31] * 300_000))  # five bytes a token
        await served.recorder.until(lambda: len(served.recorder.frames) == 4)
        assert [frame.handle for frame in served.recorder.frames] == [0, 1, 2, 3]
        assert here.links == [dialer.link]


async def test_sender_goes_on_and_newest_arrives_when_a_peer_does_not_read() -> None:
    """1.2 MB each round, 48 MB in all: more than any buffer on the way holds."""
    num_sessions, num_rounds = 20, 40
    text = (99,) * 60_000
    async with reluctant_speculator() as (reader, address), verifier(address) as (dialer, here):
        await here.heard("opened")
        link = here.links[0]
        for number in range(num_rounds):
            for handle in range(num_sessions):
                link.send(Attach(handle, text, 1, GREEDY, noise_key=number, node_budget=0))
            await asyncio.sleep(0)
        reader.may_read.set()
        wanted = dict.fromkeys(range(num_sessions), num_rounds - 1)
        await reader.until(lambda: reader.newest == wanted)
        assert reader.num_frames < num_sessions * num_rounds / 2
        assert here.links == [dialer.link]


async def test_newer_stream_replaces_older_when_the_older_does_not_read() -> None:
    async with speculator() as served, raw_verifier(served.address) as stuck:
        await stuck.say(VERIFIER)
        await served.recorder.heard("opened")
        for handle in range(4000):  # 16 MB: more than any buffer on the way holds
            served.recorder.links[0].send(Refused(handle, "x" * 4096))
        await stuck.say(Heartbeat())
        async with verifier(served.address) as (dialer, here):
            await here.heard("opened")
            assert served.recorder.events[1].startswith("closed verifier-1: stream of instance")
            here.links[0].send(attach(1))
            await served.recorder.heard("received Attach 1")
            assert here.links == [dialer.link]


async def test_link_is_dropped_when_a_peer_lets_sessions_pile_up() -> None:
    async with speculator() as served, raw_verifier(served.address) as raw:
        await raw.say(VERIFIER)
        await served.recorder.heard("opened")
        link = served.recorder.links[0]
        for handle in range(20_000):
            link.send(NeedSync(handle))
        assert link.why_closed == "16384 sessions wait to be sent; the limit is 16384"


async def test_stream_is_refused_when_it_does_not_begin_with_a_hello() -> None:
    async with speculator() as served, raw_verifier(served.address) as raw:
        await raw.say(attach(1))
        assert str(await raw.end()) == "stream begins with Attach; it must begin with a hello"
        assert served.recorder.events == []


async def test_stream_is_refused_when_no_hello_comes() -> None:
    async with speculator() as served, raw_verifier(served.address) as raw:
        assert str(await raw.end()) == "peer sent no hello within 2.0 s"


async def test_stream_comes_back_when_the_server_does() -> None:
    async with speculator() as served:
        address = served.address
        async with verifier(address) as (dialer, here):
            await here.heard("opened")
            served.acceptor.close("restart")
            await served.server.stop()
            await here.heard("closed")
            assert type(await problem_of(dialer)) is Unavailable
            async with speculator(address=address):
                await here.until(lambda: len(here.links) == 2)
                assert dialer.link is here.links[1]
                assert dialer.problem is None


async def test_dialer_gives_up_when_a_port_answers_nothing() -> None:
    """Something listens, but it does not speak gRPC: the connection opens and stays silent."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host, port = silent.getsockname()
        async with verifier(f"{host}:{port}") as (dialer, _):
            assert str(await problem_of(dialer)) == "peer sent no hello within 2.0 s"


async def test_dialer_goes_on_when_its_own_hello_cannot_be_encoded() -> None:
    hellos = iter([dataclasses.replace(VERIFIER, vocab_size=-1), VERIFIER])
    async with speculator() as served:
        here = Recorder()
        dialer = Dialer(served.address, SPECULATE, lambda: next(hellos), Heartbeat, here)
        dialer.start()
        await here.heard("opened")
        await dialer.close()


async def test_dialer_goes_on_when_its_call_is_cancelled_under_it() -> None:
    """gRPC ends a call that it cancels itself with the exception that also ends a task."""
    cancelled = iter([True, False])

    def hello() -> Hello:
        if next(cancelled):
            raise asyncio.CancelledError
        return VERIFIER

    async with speculator() as served:
        here = Recorder()
        dialer = Dialer(served.address, SPECULATE, hello, Heartbeat, here)
        dialer.start()
        await here.heard("opened")
        await dialer.close()


async def test_log_stays_short_when_a_peer_sends_nothing_but_bad_frames() -> None:
    message = pb.SpeculateRequest()
    for handle in range(1000):
        message.frames.add().attach.handle = handle
    with structlog.testing.capture_logs() as logs:
        async with speculator() as served, raw_verifier(served.address) as raw:
            await raw.say(VERIFIER)
            await raw.write(message)
            await served.recorder.until(lambda: len(served.recorder.failures) == 1000)
    counts = [entry["count"] for entry in logs if entry["event"] == "bad frame"]
    assert counts == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


async def test_stream_fails_and_peer_hears_of_it_when_opened_raises() -> None:
    class Broken(Recorder):
        def opened(self, link: Any) -> None:
            super().opened(link)
            raise KeyError("secret")

    async with speculator(recorder=Broken()) as served, raw_verifier(served.address) as raw:
        await raw.say(VERIFIER)
        assert str(await raw.end()) == "internal error"
        assert served.recorder.events == ["opened verifier-1", "closed verifier-1: internal error"]
