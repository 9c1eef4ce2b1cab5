"""What waits to be sent on a stream: one slot per session, so that memory is bounded by sessions.

A slot holds a short list of frames in order, at most `[Attach, Commit]`, `[NeedSync, Draft]`,
`[Start, Cancel]` or `[Progress, Completed]`: what comes later is merged into what waits. A peer
that reads slowly gets fewer, longer frames and never blocks the sender.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import replace
from typing import Generic, TypeVar

from treecast.errors import Overloaded
from treecast.wire.frames import (
    Attach,
    Cancel,
    Commit,
    Completed,
    Detach,
    Draft,
    Failed,
    Forget,
    Heartbeat,
    NeedSync,
    Progress,
    Refused,
)

MAX_SLOTS = 16384
"""Slots that may wait at once. Ended sessions leave a slot each until the peer reads."""

F = TypeVar("F")

_LAST = (Detach, Cancel, Completed, Failed, Refused)
_REPLACES_ALL = (Attach, Detach, NeedSync, Refused, Forget, Heartbeat)


class Outbox(Generic[F]):
    """Frames that wait for the stream to take them. Not thread-safe: event loop only."""

    def __init__(self, max_slots: int = MAX_SLOTS) -> None:
        self._max_slots = max_slots
        self._slots: dict[Hashable, list[F]] = {}
        self._due = False
        self._changed = asyncio.Event()
        self._sent = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        """Slots in use."""
        return len(self._slots)

    def put(self, key: Hashable, frame: F, waits: bool = False) -> None:
        """Merge a frame into its slot. Never blocks; dropped after `close`.

        Args:
            waits: it goes with the next one that does not, and wakes nobody.
        Raises:
            Overloaded: the peer has let too many slots pile up.
        """
        if self._closed:
            return
        if key not in self._slots and len(self._slots) >= self._max_slots:
            raise Overloaded(
                f"{len(self._slots)} sessions wait to be sent; the limit is {self._max_slots}"
            )
        self._slots[key] = merge_waiting(self._slots.get(key, []), frame)
        if not waits:
            self._due = True
            self._sent.clear()
            self._changed.set()

    async def take(self) -> list[F]:
        """Wait for frames and drain them all, sessions in the order they came; empty once closed.

        One taker at a time.
        """
        while not self._due and not self._closed:
            self._changed.clear()
            self._sent.set()
            await self._changed.wait()
        self._due = False
        slots, self._slots = self._slots, {}
        return [frame for waiting in slots.values() for frame in waiting]

    async def sent(self) -> None:
        """Wait until whoever takes has come back for more and none is due, or it is closed."""
        await self._sent.wait()

    def close(self) -> None:
        """Drop what waits and wake `take` and `sent`. Safe to repeat."""
        self._closed = True
        self._slots.clear()
        self._changed.set()
        self._sent.set()


def slot_key(frame: object) -> Hashable:
    """The session of a frame; those without one share a slot per kind (`Forget`: per session)."""
    if isinstance(frame, Forget):
        return frame.session
    handle: int | None = getattr(frame, "handle", None)
    return type(frame).__name__ if handle is None else handle


def merge_waiting(waiting: list[F], frame: F) -> list[F]:
    """What one slot holds after `frame`, given what waits in it. Changes neither.

    Nothing follows a session's last frame, but for an `Attach` that begins it anew.
    """
    last = waiting[-1] if waiting else None
    if isinstance(last, _LAST) and not isinstance(frame, Attach | Forget | Heartbeat):
        return waiting
    if isinstance(frame, _REPLACES_ALL):
        return [frame]
    if isinstance(frame, Draft):
        return [*(other for other in waiting if not isinstance(other, Draft)), frame]
    joined = join(last, frame)
    return [*waiting, frame] if joined is None else [*waiting[:-1], joined]  # type: ignore[list-item]


def join(last: object, frame: object) -> Commit | Progress | None:
    """One frame that says what two in a row said; None for two that stay apart.

    After commits that do not fit together the later stands alone: the receiver sees the gap and
    asks for an `Attach`.
    """
    if isinstance(last, Commit) and isinstance(frame, Commit):
        return _join_commits(last, frame)
    if isinstance(last, Progress) and isinstance(frame, Progress):
        return _join_progress(last, frame)
    return None


def _join_commits(last: Commit, frame: Commit) -> Commit:
    if last.from_len + len(last.tokens) != frame.from_len:
        return frame
    return replace(frame, from_len=last.from_len, tokens=last.tokens + frame.tokens)


def _join_progress(last: Progress, frame: Progress) -> Progress | None:
    if last.from_index + len(last.tokens) != frame.from_index:
        return None
    if bool(last.logprobs) != bool(frame.logprobs):
        return None
    return Progress(
        frame.handle,
        last.from_index,
        last.tokens + frame.tokens,
        last.logprobs + frame.logprobs,
        last.cost + frame.cost,
        last.rounds + frame.rounds,
    )
