"""Groups of draws on the wire: checked against their tree and their own distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence

from treecast.draws import DRAWN, MAX_DRAWS, DrawGroup, Draws, Proposal
from treecast.errors import InvalidTree
from treecast.tree import ROOT, TokenTree
from treecast.v1 import sampling_pb2, tree_pb2
from treecast.wire.codec.bounds import Limits, check_at_most

MAX_GROUPS = 512
MAX_ENTRIES = 256
"""Tokens of positive probability in one distribution."""
SUM_TOLERANCE = 1e-4
_KINDS = {sampling_pb2.Proposal.ValueType(kind.value): kind for kind in DRAWN}


def encode_group(group: DrawGroup) -> tree_pb2.DrawGroup:
    return tree_pb2.DrawGroup(
        parent=group.parent + 1,
        proposer=group.proposers,
        kind=sampling_pb2.Proposal.ValueType(group.draws.kind.value),
        ids=group.draws.ids,
        probabilities=group.draws.weights,
        draws=group.draws.drawn,
    )


def decode_group(message: tree_pb2.DrawGroup) -> DrawGroup:
    """Of a group that `check_groups` has passed."""
    draws = Draws(
        _KINDS[message.kind],
        tuple(message.ids),
        tuple(message.probabilities),
        tuple(message.draws),
    )
    return DrawGroup(message.parent + ROOT, draws, message.proposer)


def check_groups(groups: Sequence[tree_pb2.DrawGroup], tree: TokenTree, limits: Limits) -> None:
    """Refuse what cannot have been drawn, sizes first.

    Raises:
        InvalidTree: naming the group, the value and its bound.
    """
    check_at_most(len(groups), MAX_GROUPS, "number of groups of draws", InvalidTree)
    for index, group in enumerate(groups):
        name = f"group {index}"
        _check_sizes(group, name)
        _check_place(group, name, tree, limits)
        _check_distribution(group, name, limits)
        _check_draws(group, name, tree)


def _check_sizes(group: tree_pb2.DrawGroup, name: str) -> None:
    entries, probabilities = len(group.ids), len(group.probabilities)
    check_at_most(entries, MAX_ENTRIES, f"number of tokens of {name}", InvalidTree)
    check_at_most(len(group.draws), MAX_DRAWS, f"number of draws of {name}", InvalidTree)
    if entries != probabilities:
        raise InvalidTree(f"{name} has {entries} token ids and {probabilities} probabilities")
    if not group.draws:
        raise InvalidTree(f"{name} has no draws; allowed: 1..{MAX_DRAWS}")


def _check_place(group: tree_pb2.DrawGroup, name: str, tree: TokenTree, limits: Limits) -> None:
    if group.parent > len(tree):
        raise InvalidTree(f"{name} hangs below node {group.parent - 1}; the tree has {len(tree)}")
    known = 0 < group.proposer < 1 << limits.num_proposers
    if not known or group.proposer.bit_count() != 1:
        raise InvalidTree(
            f"{name} has proposer bits {group.proposer}; allowed: one of the "
            f"{limits.num_proposers} that the peer named"
        )
    if group.kind not in _KINDS:
        allowed = ", ".join(f"{kind.value} ({kind.name.lower()})" for kind in DRAWN)
        raise InvalidTree(f"{name} has kind {group.kind}; allowed: {allowed}")


def _check_distribution(group: tree_pb2.DrawGroup, name: str, limits: Limits) -> None:
    for token, probability in zip(group.ids, group.probabilities, strict=True):
        if limits.vocab_size and token >= limits.vocab_size:
            raise InvalidTree(
                f"{name} gives token {token} a probability; the vocabulary has {limits.vocab_size}"
            )
        if not 0 < probability <= 1 + SUM_TOLERANCE:  # NaN too
            raise InvalidTree(
                f"{name} gives token {token} probability {probability}; the bounds are (0, 1]"
            )
    if len(set(group.ids)) < len(group.ids):
        raise InvalidTree(f"{name} gives a token two probabilities")
    total = math.fsum(group.probabilities)
    if abs(total - 1) > SUM_TOLERANCE:
        raise InvalidTree(
            f"probabilities of {name} sum to {total:.6g}; allowed: 1 within {SUM_TOLERANCE}"
        )


def _check_draws(group: tree_pb2.DrawGroup, name: str, tree: TokenTree) -> None:
    support, parent = set(group.ids), group.parent + ROOT
    for token in group.draws:
        if token not in support:
            raise InvalidTree(f"{name} draws token {token}, to which it gives no probability")
        if tree.child(parent, token) is None:
            raise InvalidTree(f"{name} draws token {token}, which is no child of node {parent}")
    repeats = len(group.draws) - len(set(group.draws))
    if repeats and _KINDS[group.kind] is Proposal.WITHOUT_REPLACEMENT:
        raise InvalidTree(f"{name} draws without replacement and repeats {repeats} of its draws")
