"""The two pair streams, each described once: who dials, which method, how frames are coded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc

from treecast.errors import InvalidFrame
from treecast.v1.speculator_pb2_grpc import SpeculatorServiceStub
from treecast.v1.verifier_pb2_grpc import VerifierServiceStub
from treecast.wire import codec
from treecast.wire.codec import Limits
from treecast.wire.frames import (
    Heartbeat,
    Hello,
    Role,
    RouterFrame,
    ServingFrame,
    SpeculatorFrame,
    VerifierFrame,
)

Out = TypeVar("Out")
In = TypeVar("In")

# Request and response messages differ by hop and have no common type, hence `Any`.
StreamCall = Callable[[Any], "grpc.aio.StreamStreamCall[Any, Any]"]


@dataclass(frozen=True, slots=True)
class End(Generic[Out, In]):
    """One end of a hop: what it is, whom it faces, and how it writes and reads messages."""

    role: Role
    peer_role: Role
    encode: Callable[[Iterable[Out | Hello | Heartbeat]], Any]
    decode: Callable[[Any, Limits], Iterator[In | Hello | Heartbeat | InvalidFrame]]


@dataclass(frozen=True, slots=True)
class Hop(Generic[Out, In]):
    """A pair stream; `Out` and `In` as the dialing end sees them."""

    call: Callable[[grpc.aio.Channel], StreamCall]
    dialing: End[Out, In]
    serving: End[In, Out]


SPECULATE: Hop[VerifierFrame, SpeculatorFrame] = Hop(
    call=lambda channel: SpeculatorServiceStub(channel).Speculate,
    dialing=End(
        role=Role.VERIFIER,
        peer_role=Role.SPECULATOR,
        encode=codec.encode_verifier_frames,
        decode=codec.decode_speculator_frames,
    ),
    serving=End(
        role=Role.SPECULATOR,
        peer_role=Role.VERIFIER,
        encode=codec.encode_speculator_frames,
        decode=codec.decode_verifier_frames,
    ),
)

SERVE: Hop[RouterFrame, ServingFrame] = Hop(
    call=lambda channel: VerifierServiceStub(channel).Serve,
    dialing=End(
        role=Role.ROUTER,
        peer_role=Role.VERIFIER,
        encode=codec.encode_router_frames,
        decode=codec.decode_serving_frames,
    ),
    serving=End(
        role=Role.VERIFIER,
        peer_role=Role.ROUTER,
        encode=codec.encode_serving_frames,
        decode=codec.decode_router_frames,
    ),
)
