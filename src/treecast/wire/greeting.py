"""The first message of each side of a stream: who the peer is, and whether the two fit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from treecast.errors import InvalidFrame, PeerMismatch, Unavailable
from treecast.wire.codec import Limits
from treecast.wire.frames import Heartbeat, Hello, Role
from treecast.wire.hop import End

HELLO_TIMEOUT_S = 2.0
"""How long a peer may take from connection to hello."""

_HUNG_FACTOR = 10
_HUNG_FLOOR_MS = 10_000
"""On oversubscribed cores steps of 150 ms were seen to take over 2 s. To give such a peer up moves
its sessions, whose prompts are then computed anew, to peers that are no better off."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """A peer's first message; a hello alone stands for an idle peer."""

    hello: Hello
    heartbeat: Heartbeat = field(default_factory=Heartbeat)


async def receive_greeting(
    end: End[Any, Any], messages: AsyncIterator[Any], ours: Hello
) -> Greeting:
    """Wait for the peer's first message and judge it.

    Raises:
        Unavailable: none came in time, or the peer's step hangs.
        InvalidFrame: it is not a hello, alone or with a heartbeat.
        PeerMismatch: the two do not fit.
    """
    greeting = await _first_message(end, messages)
    check_peer(ours, greeting.hello, end.peer_role)
    check_alive(greeting.heartbeat)
    return greeting


async def _first_message(end: End[Any, Any], messages: AsyncIterator[Any]) -> Greeting:
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            message = await anext(messages)
    except TimeoutError:
        raise Unavailable(f"peer sent no hello within {HELLO_TIMEOUT_S} s") from None
    except StopAsyncIteration:
        raise Unavailable("peer ended the stream before its hello") from None
    return _parse(list(end.decode(message, Limits())))


def _parse(frames: list[object]) -> Greeting:
    match frames:
        case [Hello() as hello]:
            return Greeting(hello)
        case [Hello() as hello, Heartbeat() as heartbeat]:
            return Greeting(hello, heartbeat)
        case [InvalidFrame() as error, *_]:
            raise error
    kinds = ", ".join(type(frame).__name__ for frame in frames[:4]) or "nothing"
    raise InvalidFrame(f"stream begins with {kinds}; it must begin with a hello")


def check_peer(ours: Hello, theirs: Hello, role: Role) -> None:
    """Raise PeerMismatch, naming the field and both values, if the two cannot work together.

    A vocabulary size of 0 and an empty tokenizer hash fit everything.
    """
    if theirs.role is not role:
        raise _mismatch("role", role.name.lower(), theirs.role.name.lower(), theirs)
    if theirs.protocol_version != ours.protocol_version:
        raise _mismatch("protocol_version", ours.protocol_version, theirs.protocol_version, theirs)
    for name in ("vocab_size", "tokenizer_hash"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine and other and mine != other:
            raise _mismatch(name, mine, other, theirs)
    if not set(ours.laws) & set(theirs.laws):
        mine, other = ([law.name.lower() for law in hello.laws] for hello in (ours, theirs))
        raise _mismatch("laws", mine, other, theirs)


def _mismatch(name: str, expected: object, got: object, theirs: Hello) -> PeerMismatch:
    return PeerMismatch(f"{name} of peer {theirs.instance_id!r} is {got}; expected {expected}")


def is_hung(heartbeat: Heartbeat) -> bool:
    """Whether the peer's running step is so late that the peer counts as dead."""
    bound_ms = max(_HUNG_FLOOR_MS, _HUNG_FACTOR * heartbeat.step_predicted_ms)
    return heartbeat.step_age_ms > bound_ms


def check_alive(heartbeat: Heartbeat) -> None:
    """Raise Unavailable if the peer hangs."""
    if is_hung(heartbeat):
        raise Unavailable(
            f"peer's step has run for {heartbeat.step_age_ms} ms; "
            f"predicted were {heartbeat.step_predicted_ms} ms"
        )
