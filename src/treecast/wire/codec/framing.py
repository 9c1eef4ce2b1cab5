"""Frames in and out of a message by table, so that both hops and both directions share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from treecast.errors import InvalidFrame, TreecastError
from treecast.v1 import pair_pb2
from treecast.wire.codec.bounds import MAX_FRAMES, Limits, check_at_most
from treecast.wire.codec.messages import (
    decode_heartbeat,
    decode_hello,
    encode_heartbeat,
    encode_hello,
)
from treecast.wire.frames import BadFrame, Heartbeat, Hello

F = TypeVar("F")

# protobuf's generated messages share no useful static type, so their bodies are `Any` here.
Encoder = Callable[[Any], dict[str, Any]]
Decoder = Callable[[Any, Limits], F]


def encode_body(frame: object, encoders: Mapping[type, Encoder]) -> dict[str, Any]:
    """The one field of a `*Frame` message that holds this frame."""
    if isinstance(frame, Hello):
        return {"hello": encode_hello(frame)}
    if isinstance(frame, Heartbeat):
        return {"heartbeat": encode_heartbeat(frame)}
    return encoders[type(frame)](frame)


def decode_frames(
    frames: Any,  # repeated *Frame
    decoders: Mapping[str, Decoder[F]],
    limits: Limits,
) -> Iterator[F | Hello | Heartbeat | InvalidFrame]:
    """Translate frame by frame; one that is malformed comes out as the error it is.

    A `BadFrame` names its session. A plain `InvalidFrame` names none.

    Raises:
        InvalidFrame: the message has more than `MAX_FRAMES` frames.
    """
    check_at_most(len(frames), MAX_FRAMES, "number of frames in a message")
    for frame in frames:
        yield _decode_frame(frame, decoders, limits)


def _decode_frame(
    frame: Any, decoders: Mapping[str, Decoder[F]], limits: Limits
) -> F | Hello | Heartbeat | InvalidFrame:
    kind = frame.WhichOneof("frame")
    if kind is None:
        return InvalidFrame("frame has no kind that this version knows")
    body = getattr(frame, kind)
    try:
        if isinstance(body, pair_pb2.Hello):
            return decode_hello(body)
        if isinstance(body, pair_pb2.Heartbeat):
            return decode_heartbeat(body)
        return decoders[kind](body, limits)
    except TreecastError as error:
        return _blame(body, error)


def _blame(body: Any, error: TreecastError) -> InvalidFrame:
    if "handle" in body.DESCRIPTOR.fields_by_name:
        return BadFrame(body.handle, error)
    return InvalidFrame(error.message)
