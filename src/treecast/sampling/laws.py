"""The laws by which trees are accepted, and the walk that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from treecast.sampling.logprobs import TokenLogprobs, token_logprobs
from treecast.sampling.mss import MSS
from treecast.sampling.params import Law
from treecast.sampling.pick import Picker
from treecast.sampling.replay import Replay
from treecast.sampling.stops import Stop
from treecast.tree import ROOT, TokenTree


class AcceptanceRule(Protocol):
    """A law: what a tree must carry, and which token follows at a node."""

    def check(self, tree: TokenTree) -> None:
        """Refuse a tree that the law cannot serve.

        Raises:
            InvalidTree: what is missing, by name.
        """

    def takes_likeliest(self, picker: Picker) -> bool:
        """Whether the next token is the logits' argmax (ties to the lowest id) for any tree."""

    def next_token(
        self,
        tree: TokenTree,
        node: int,
        logits: NDArray[np.float32],  # [vocab], the target's at the node
        picker: Picker,
    ) -> int:
        """The output's next token after `node` (or `ROOT`), where `picker`'s context ends.

        Changes nothing. If a child of the node holds the token, the walk goes on there.
        """


class Rows(Protocol):
    """Logits of the root and of a tree's nodes; only rows that the walk visits are asked for."""

    def __getitem__(self, row: int, /) -> NDArray[np.float32]: ...


@runtime_checkable
class RankedRows(Protocol):
    """Rows whose argmax may be known where they lie, so that the row itself can stay there."""

    def likeliest(self, row: int, /) -> int | None:
        """The argmax, ties to the lowest id; None where the row must be looked at."""


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
    law: AcceptanceRule,
) -> Walk:
    """Follow a law's tokens down a drafted tree.

    Mutates `picker`'s context and calls `check_stop` with each token in turn; not to be retried.
    """
    done = Walk([], [], [], None)
    ranked = rows if isinstance(rows, RankedRows) and law.takes_likeliest(picker) else None
    node: int | None = ROOT
    while node is not None:
        token = None if ranked is None else ranked.likeliest(node + 1)
        if token is None:
            token = law.next_token(tree, node, rows[node + 1], picker)
        _emit(token, rows, node + 1, picker, done)
        if stop := check_stop(token):
            return Walk(done.tokens, done.accepted, done.logprobs, stop)
        node = tree.child(node, token)
        if node is not None:
            done.accepted.append(node)
    return done


def _emit(token: int, rows: Rows, row: int, picker: Picker, done: Walk) -> None:
    picker.accept(token)
    done.tokens.append(token)
    if picker.sampling.logprobs is not None:
        done.logprobs.append(token_logprobs(rows[row], token, picker.sampling.logprobs))


def acceptance_rule(law: Law) -> AcceptanceRule:
    """The law of that name."""
    return Replay() if law is Law.REPLAY else MSS()
