"""What a hostile worker is asked, and valid answers to it, which the fuzzer damages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from google.protobuf.message import Message

from treecast.v1 import sampling_pb2, speculator_pb2, tree_pb2, verifier_pb2
from treecast.wire import codec
from treecast.wire.frames import Completed, FinishReason, Heartbeat, Hello, Role, Usage

from . import corpus


@dataclass(frozen=True, slots=True)
class Lie:
    """One kind of worker, as its peers see it.

    Attributes:
        hello: its instance id is another one on each stream.
        greet: the first message: hello and heartbeat.
        question: messages that come, of frames; `answer`: messages that go back.
        learn: takes in one frame: length of the text so far, by handle.
        frames: valid ones about a handle whose text is so long.
    """

    path: str
    hello: Hello
    greet: Callable[[Hello], bytes]
    question: type[Any]
    answer: type[Message]
    learn: Callable[[Any, dict[int, int]], None]
    frames: Callable[[int, int], Sequence[Message]]


def _learn_speculated(frame: speculator_pb2.VerifierFrame, asked: dict[int, int]) -> None:
    match frame.WhichOneof("frame"):
        case "attach":
            asked[frame.attach.handle] = len(frame.attach.tokens)
        case "commit" if frame.commit.handle in asked:
            asked[frame.commit.handle] = frame.commit.from_len + len(frame.commit.tokens)
        case "detach":
            asked.pop(frame.detach.handle, None)


def _drafts(handle: int, length: int) -> Sequence[Message]:
    """Mostly a tree of five nodes with a branch."""
    tree = tree_pb2.TokenTree(
        tokens=[1, 2, 3, 4, 5],
        parents=[0, 1, 1, 2, 4],
        log_confidence=bytes([3] * 5),
        proposers=bytes([1] * 5),
    )
    drawn = speculator_pb2.Draft(handle=handle, base_len=length, tree=tree)
    need_sync = speculator_pb2.NeedSync(handle=handle)
    return (
        *[speculator_pb2.SpeculatorFrame(draft=drawn)] * 50,
        speculator_pb2.SpeculatorFrame(need_sync=need_sync),
    )


def _learn_served(frame: verifier_pb2.RouterFrame, asked: dict[int, int]) -> None:
    match frame.WhichOneof("frame"):
        case "start":
            asked[frame.start.handle] = len(frame.start.committed)
        case "cancel":
            asked.pop(frame.cancel.handle, None)


def _progress(handle: int, length: int) -> Sequence[Message]:
    """Tokens, mostly; now and then the end, or none of either."""
    logprobs = sampling_pb2.TokenLogprobs(chosen=-1.0)
    tokens = verifier_pb2.Progress(
        handle=handle, from_index=length, tokens=[5], logprobs=[logprobs]
    )
    ended = Completed(handle, FinishReason.LENGTH, Usage(prompt_tokens=3, output_tokens=length + 1))
    return (
        *[verifier_pb2.ServingFrame(progress=tokens)] * 20,
        *codec.encode_serving_frames([ended]).frames,
        verifier_pb2.ServingFrame(failed=verifier_pb2.Failed(handle=handle)),
        *[verifier_pb2.ServingFrame(heartbeat=codec.encode_heartbeat(Heartbeat()))] * 5,
    )


SPECULATOR_LIE = Lie(
    path=corpus.SPECULATE.path,
    hello=corpus.hello(Role.SPECULATOR, ""),
    greet=lambda ours: codec.encode_speculator_frames([ours, Heartbeat()]).SerializeToString(),
    question=speculator_pb2.SpeculateRequest,
    answer=speculator_pb2.SpeculateResponse,
    learn=_learn_speculated,
    frames=_drafts,
)

VERIFIER_LIE = Lie(
    path=corpus.SERVE.path,
    hello=replace(corpus.hello(Role.VERIFIER, ""), model_revision=corpus.LIAR_REVISION),
    greet=lambda ours: codec.encode_serving_frames([ours, Heartbeat()]).SerializeToString(),
    question=verifier_pb2.ServeRequest,
    answer=verifier_pb2.ServeResponse,
    learn=_learn_served,
    frames=_progress,
)
