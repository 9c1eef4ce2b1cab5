"""The replay law: plain decoding, run along a tree for as far as the tree foresaw it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treecast.sampling.logprobs import TokenLogprobs, token_logprobs
from treecast.sampling.pick import Picker
from treecast.sampling.stops import Stop
from treecast.tree import ROOT, TokenTree


class Rows(Protocol):
    """Logits of the root and of a tree's nodes; only rows that the walk visits are asked for."""

    def __getitem__(self, row: int, /) -> NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class Walk:
    """What one verified tree yields.

    Attributes:
        tokens: the output, at least one: those of the accepted nodes, then the bonus token.
        accepted: nodes from the root's child down; one fewer than `tokens`.
        logprobs: one per token if the request wants them, else empty.
        stop: why the output ends with the last token, if it does.
    """

    tokens: list[int]
    accepted: list[int]
    logprobs: list[TokenLogprobs]
    stop: Stop | None


def walk(
    tree: TokenTree,
    rows: Rows,  # [len(tree) + 1] rows of [vocab]: the root's, then each node's
    picker: Picker,
    check_stop: Callable[[int], Stop | None],
) -> Walk:
    """Follow the target's own picks down a drafted tree.

    The tokens are those of plain decoding, whatever the tree holds. Mutates `picker`'s context and
    calls `check_stop` with each token in turn; not to be retried.

    Source: Daliri et al. 2024 (arXiv 2408.07978).
    """
    done = Walk([], [], [], None)
    node: int | None = ROOT
    while node is not None:
        token = _decode_one(rows[node + 1], picker, done)
        if stop := check_stop(token):
            return Walk(done.tokens, done.accepted, done.logprobs, stop)
        node = tree.child(node, token)
        if node is not None:
            done.accepted.append(node)
    return done


def _decode_one(logits: NDArray[np.float32], picker: Picker, done: Walk) -> int:
    token = picker.pick(logits)
    picker.accept(token)
    done.tokens.append(token)
    if picker.sampling.logprobs is not None:
        done.logprobs.append(token_logprobs(logits, token, picker.sampling.logprobs))
    return token
