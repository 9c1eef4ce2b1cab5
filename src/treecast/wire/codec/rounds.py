"""Rounds on the wire: checked like trees, since they come from a peer as well."""

from __future__ import annotations

from dataclasses import replace

from treecast.errors import InvalidFrame
from treecast.tree import MAX_DEPTH, MAX_PROPOSERS, ROOT, TokenTree
from treecast.v1 import verifier_pb2 as pb
from treecast.wire.codec.bounds import (
    MAX_TOKENS,
    UINT32_MAX,
    Limits,
    check_at_most,
    check_text,
    check_tokens,
)
from treecast.wire.codec.trees import confidence_byte, decode_nodes
from treecast.wire.rounds import MAX_DRAFTS, Round, RoundDraft

_LEAST = 1e-14


def encode_round(one: Round) -> pb.Round:
    tree = one.tree
    return pb.Round(
        from_index=one.from_index,
        tokens=tree.tokens,
        parents=[parent + 1 for parent in tree.parents],
        log_confidence=bytes(_byte(belief) for belief in tree.confidence),
        proposers=tree.proposers,
        accepted=one.accepted,
        bonus=one.bonus,
        drafts=[_encode_draft(draft) for draft in one.drafts],
        began_us=one.began_us,
        waited_us=min(one.waited_us, UINT32_MAX),
        verified_us=min(one.verified_us, UINT32_MAX),
        prompt_tokens=one.prompt_tokens,
    )


def _byte(belief: float) -> int:
    """What a policy makes of confidence may leave the bounds that a draft's has."""
    return confidence_byte(min(1.0, max(belief, _LEAST)))


def _encode_draft(draft: RoundDraft) -> pb.RoundDraft:
    return pb.RoundDraft(
        speculator=draft.speculator,
        proposers=draft.proposers,
        num_nodes=draft.num_nodes,
        came_us=draft.came_us,
        drafting_us=draft.drafting_us,
    )


def decode_round(message: pb.Round, limits: Limits | None = None) -> Round:
    """Check what a round holds, then build it.

    Raises:
        InvalidTree: nodes that form no tree, as in `decode_tree`.
        InvalidFrame: too many drafts or names, an unknown token, or accepted nodes that are no
            path from the root.
    """
    limits = limits or Limits()
    check_at_most(len(message.drafts), MAX_DRAFTS, "number of a round's drafts")
    drafts = tuple(_decode_draft(draft) for draft in message.drafts)
    num_proposers = sum(len(draft.proposers) for draft in drafts)
    tree = decode_nodes(message, replace(limits, num_proposers=num_proposers))
    check_at_most(len(message.accepted), MAX_DEPTH, "number of a round's accepted nodes")
    accepted = _check_path(tree, tuple(message.accepted))
    check_at_most(message.from_index + len(accepted) + 1, MAX_TOKENS, "output after a round")
    return Round(
        from_index=message.from_index,
        tree=tree,
        accepted=accepted,
        bonus=check_tokens([message.bonus], "round", limits)[0],
        drafts=drafts,
        began_us=message.began_us,
        waited_us=message.waited_us,
        verified_us=message.verified_us,
        prompt_tokens=message.prompt_tokens,
    )


def _decode_draft(message: pb.RoundDraft) -> RoundDraft:
    check_at_most(len(message.proposers), MAX_PROPOSERS, "number of a draft's proposers")
    return RoundDraft(
        check_text(message.speculator, "a round's speculator"),
        tuple(check_text(name, "a round's proposer") for name in message.proposers),
        message.num_nodes,
        message.came_us,
        message.drafting_us,
    )


def _check_path(tree: TokenTree, nodes: tuple[int, ...]) -> tuple[int, ...]:
    above = ROOT
    for node in nodes:
        if node >= len(tree) or tree.parents[node] != above:
            raise InvalidFrame(f"accepted node {node} is no child of {above} in a round's tree")
        above = node
    return nodes
