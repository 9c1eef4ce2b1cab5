"""Frames into messages that the peer will take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from treecast.errors import InvalidFrame
from treecast.wire.channel import MAX_MESSAGE_BYTES
from treecast.wire.codec.bounds import MAX_FRAMES

F = TypeVar("F")

# The messages of the two hops have no common type, hence `Any`.
Encode = Callable[[Sequence[F]], Any]


def pack(
    encode: Encode[F], frames: Sequence[F], refuse: Callable[[F, InvalidFrame], None]
) -> Iterator[Any]:
    """Yield messages under the caps, frames in order.

    A frame that cannot be sent even alone goes to `refuse` instead, so that it harms no other.
    """
    try:
        message = encode_within_caps(encode, frames)
    except InvalidFrame as error:
        if len(frames) == 1:
            refuse(frames[0], error)
            return
        middle = len(frames) // 2
        yield from pack(encode, frames[:middle], refuse)
        yield from pack(encode, frames[middle:], refuse)
    else:
        yield message


def encode_within_caps(encode: Encode[F], frames: Sequence[F]) -> Any:
    """Raises InvalidFrame for too many frames, too many bytes, or values that no field can hold."""
    if len(frames) > MAX_FRAMES:
        raise InvalidFrame(f"message has {len(frames)} frames; the limit is {MAX_FRAMES}")
    try:
        message = encode(frames)
    except Exception as error:
        raise InvalidFrame(f"frame cannot be encoded: {error}") from error
    if message.ByteSize() > MAX_MESSAGE_BYTES:
        raise InvalidFrame(
            f"message has {message.ByteSize()} bytes; the limit is {MAX_MESSAGE_BYTES}"
        )
    return message
