"""What a peer may send at most, checked before anything is built of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treecast.errors import InvalidFrame, TreecastError
from treecast.tree import MAX_DEPTH, MAX_NODES, MAX_PROPOSERS

MAX_TOKENS = 1 << 20
"""Longest token list in one frame, whatever the model's context."""

MAX_FRAMES = 4096
"""Most frames in one message; a sender splits what is more."""

MAX_NAME_CHARACTERS = 256
MAX_TEXT_CHARACTERS = 4096
MAX_TRACEPARENT_CHARACTERS = 55
MAX_PRIORITY = 10
UINT32_MAX = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that depend on the two peers.

    Attributes:
        vocab_size: token ids are below this; 0 leaves them unchecked.
        num_proposers: names in the sender's hello; a tree may refer to no others.
    """

    vocab_size: int = 0
    max_nodes: int = MAX_NODES
    max_depth: int = MAX_DEPTH
    num_proposers: int = MAX_PROPOSERS


def check_at_most(
    count: int, bound: int, what: str, error: type[TreecastError] = InvalidFrame
) -> None:
    if count > bound:
        raise error(f"{what} is {count}; the limit is {bound}")


def check_text(text: str, what: str, bound: int = MAX_NAME_CHARACTERS) -> str:
    check_at_most(len(text), bound, f"number of characters in {what}")
    return text


def check_tokens(tokens: Sequence[int], what: str, limits: Limits) -> tuple[int, ...]:
    """Copy token ids out of a message; raises InvalidFrame for too many, or an unknown one."""
    check_at_most(len(tokens), MAX_TOKENS, f"number of tokens in {what}")
    if limits.vocab_size and tokens and max(tokens) >= limits.vocab_size:
        at = next(i for i, token in enumerate(tokens) if token >= limits.vocab_size)
        raise InvalidFrame(
            f"token {at} of {what} is {tokens[at]}; the vocabulary has {limits.vocab_size}"
        )
    return tuple(tokens)
