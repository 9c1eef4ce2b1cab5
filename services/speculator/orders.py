"""What the event loop asks of the drafting thread, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treecast.drafting.base import DraftRequest
from treecast.errors import TreecastError
from treecast.tree import TokenTree


@dataclass(frozen=True, slots=True)
class Open:
    """Begin a session; the first tree may have `max_nodes` nodes, with 0 none is grown.

    Its second is worth `tokens_per_s` tokens.
    """

    session: int
    request: DraftRequest
    max_nodes: int
    tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Advance:
    """The verifier committed tokens; the next tree may have `max_nodes` nodes."""

    session: int
    tokens: Sequence[int]
    max_nodes: int
    tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Close:
    """End a session; unknown ones are ignored."""

    session: int


@dataclass(frozen=True, slots=True)
class Grown:
    """A tree below the session's first `base_len` tokens; empty where there is no guess.

    It was drafted, with those of other sessions, in `drafting_us` microseconds.
    """

    session: int
    base_len: int
    tree: TokenTree
    drafting_us: int = 0


@dataclass(frozen=True, slots=True)
class Lost:
    """The drafter will do no more for this session, and has forgotten it."""

    session: int
    error: TreecastError


Order = Open | Advance | Close
Result = Grown | Lost
