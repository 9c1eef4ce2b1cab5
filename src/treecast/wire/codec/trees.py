"""Token trees on the wire: flat arrays, refused before anything is built of them."""

from __future__ import annotations

import math

from treecast.errors import InvalidTree
from treecast.tree import ROOT, TokenTree
from treecast.v1 import tree_pb2, verifier_pb2
from treecast.wire.codec.bounds import Limits
from treecast.wire.codec.draws import check_groups, decode_group, encode_group

Nodes = tree_pb2.TokenTree | verifier_pb2.Round
"""Messages that hold nodes as flat arrays of equal length."""

_STEPS_PER_NAT = 8
_CONFIDENCE = tuple(math.exp(-byte / _STEPS_PER_NAT) for byte in range(256))


def encode_tree(tree: TokenTree) -> tree_pb2.TokenTree:
    """Confidences are rounded to eighths of a nat; the least that travels is exp(-255 / 8)."""
    return tree_pb2.TokenTree(
        tokens=tree.tokens,
        parents=[parent + 1 for parent in tree.parents],
        log_confidence=bytes(confidence_byte(belief) for belief in tree.confidence),
        proposers=bytes(tree.proposers),
        groups=[encode_group(group) for group in tree.groups],
    )


def confidence_byte(confidence: float) -> int:
    """round(-8 * ln(confidence)), clipped to 255; `confidence` in (0, 1]."""
    return min(255, round(-_STEPS_PER_NAT * math.log(confidence)))


def decode_tree(message: tree_pb2.TokenTree, limits: Limits | None = None) -> TokenTree:
    """Check a tree's arrays, then build it.

    Raises:
        InvalidTree: arrays of unequal length, a parent that does not precede its child, an unknown
            token or proposer, two equal siblings, a group that is none of draws from its
            distribution, or a tree over its caps.
    """
    limits = limits or Limits()
    tree = decode_nodes(message, limits)
    check_groups(message.groups, tree, limits)
    tree.groups = [decode_group(group) for group in message.groups]
    return tree


def decode_nodes(message: Nodes, limits: Limits) -> TokenTree:
    """The same of nodes alone."""
    _check_sizes(message, limits)
    _check_parents(message, limits)
    _check_values(message, limits)
    return TokenTree.build(
        message.tokens,
        [parent - 1 for parent in message.parents],
        [_CONFIDENCE[byte] for byte in message.log_confidence],
        list(message.proposers),
    )


def _check_sizes(message: Nodes, limits: Limits) -> None:
    count = len(message.tokens)
    if count > limits.max_nodes:
        raise InvalidTree(f"tree has {count} nodes; the limit is {limits.max_nodes}")
    lengths = (len(message.parents), len(message.log_confidence), len(message.proposers))
    if lengths != (count, count, count):
        raise InvalidTree(
            f"tree arrays differ in length: {count} tokens, {lengths[0]} parents, "
            f"{lengths[1]} confidences, {lengths[2]} proposers"
        )


def _check_parents(message: Nodes, limits: Limits) -> None:
    """One pass that needs no tree: depths by parent, [0] is the root's."""
    depths = [0]
    for node, parent in enumerate(message.parents):
        if parent > node:
            raise InvalidTree(
                f"node {node} has parent {parent + ROOT}; a parent precedes its child"
            )
        depths.append(depths[parent] + 1)
    if max(depths) > limits.max_depth:
        raise InvalidTree(f"tree has depth {max(depths)}; the limit is {limits.max_depth}")


def _check_values(message: Nodes, limits: Limits) -> None:
    for node, token in enumerate(message.tokens):
        if limits.vocab_size and token >= limits.vocab_size:
            raise InvalidTree(
                f"node {node} has token {token}; the vocabulary has {limits.vocab_size}"
            )
    for node, bits in enumerate(message.proposers):
        if not 0 < bits < 1 << limits.num_proposers:
            raise InvalidTree(
                f"node {node} has proposer bits {bits}; the peer named {limits.num_proposers}"
            )
