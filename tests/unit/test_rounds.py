"""Rounds on the wire, and what of a hostile peer's is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from treecast.errors import InvalidFrame, InvalidTree, TreecastError
from treecast.services.router.relay import Output, Piece
from treecast.tree import ROOT, TokenTree
from treecast.v1 import verifier_pb2 as pb
from treecast.wire import codec
from treecast.wire.codec import Limits
from treecast.wire.frames import BadFrame, Cost, Progress
from treecast.wire.outbox import Outbox
from treecast.wire.rounds import MAX_ROUNDS, Round, RoundDraft

#   root -+- 5 (node 0) --- 7 (node 2)
#         +- 6 (node 1)
TREE = TokenTree.build([5, 6, 7], [ROOT, ROOT, 0], [1.0, 1.0, 1.0], [0b1, 0b11, 0b100])
DRAFTS = (RoundDraft("s1", ("ssm",), 3, 900, 400), RoundDraft("s2", ("ngram", "suffix"), 1, 950, 0))
ROUND = Round(4, TREE, (0, 2), 9, DRAFTS, 1000, 20, 300, 0)


def test_a_round_survives_when_sent():
    assert codec.decode_round(codec.encode_round(ROUND)) == ROUND
    assert ROUND.tokens == (5, 7, 9)
    assert ROUND.proposers == ("ssm", "ngram", "suffix")


def test_beliefs_are_clipped_when_out_of_bounds():
    tree = TokenTree.build([5, 6], [ROOT, ROOT], [0.0, 1.5], [1, 1])
    again = codec.decode_round(codec.encode_round(Round(0, tree, (), 9, DRAFTS)))
    assert again.tree.confidence == pytest.approx([0.0, 1.0], abs=1e-13)


def test_rounds_survive_beside_their_tokens_when_sent():
    later = replace(ROUND, from_index=7, tree=TokenTree(), accepted=(), drafts=(), bonus=3)
    progress = Progress(1, 4, (5, 7, 9, 3, 8), (), Cost(3), (ROUND, later))
    [again] = codec.decode_serving_frames(codec.encode_serving_frames([progress]))
    assert again == progress


def hostile(**changes: Any) -> pb.Round:
    message = codec.encode_round(ROUND)
    for name, value in changes.items():
        message.ClearField(name)
        message.MergeFrom(pb.Round(**{name: value}))
    return message


@pytest.mark.parametrize(
    ("message", "kind", "why"),
    [
        (hostile(accepted=[1, 2]), InvalidFrame, "accepted node 2 is no child of 1"),
        (hostile(accepted=[2]), InvalidFrame, "accepted node 2 is no child of -1"),
        (hostile(accepted=[3]), InvalidFrame, "accepted node 3 is no child of -1"),
        (hostile(accepted=range(33)), InvalidFrame, "accepted nodes is 33; the limit is 32"),
        (hostile(parents=[0, 0, 3]), InvalidTree, "a parent precedes its child"),
        (hostile(parents=[0, 0]), InvalidTree, "tree arrays differ in length"),
        (hostile(proposers=[1, 1, 0b1000]), InvalidTree, "proposer bits 8"),
        (hostile(proposers=[1, 1, 0]), InvalidTree, "proposer bits 0"),
        (hostile(tokens=[1] * 257), InvalidTree, "tree has 257 nodes; the limit is 256"),
        (hostile(bonus=97), InvalidFrame, "token 0 of round is 97; the vocabulary has 97"),
        (hostile(from_index=2**30), InvalidFrame, "output after a round"),
        (hostile(drafts=[pb.RoundDraft()] * 5), InvalidFrame, "drafts is 5; the limit is 4"),
        (
            hostile(drafts=[pb.RoundDraft(proposers=["x"] * 9)]),
            InvalidFrame,
            "draft's proposers is 9; the limit is 8",
        ),
        (
            hostile(drafts=[pb.RoundDraft(speculator="x" * 257)]),
            InvalidFrame,
            "257; the limit is 256",
        ),
    ],
)
def test_a_round_is_refused_by_name_when_hostile(
    message: pb.Round, kind: type[TreecastError], why: str
):
    with pytest.raises(kind, match=why):
        codec.decode_round(message, Limits(vocab_size=97))


@pytest.mark.parametrize(
    ("tokens", "rounds", "why"),
    [
        ((5, 7), (ROUND,), "none of the tokens from 4 on"),
        ((5, 7, 8), (ROUND,), "none of the tokens from 4 on"),
        ((5, 7, 9), (replace(ROUND, from_index=5),), "round from token 5 on"),
        ((5, 7, 9), (ROUND,) * (MAX_ROUNDS + 1), f"{MAX_ROUNDS + 1}; the limit is {MAX_ROUNDS}"),
    ],
)
def test_progress_is_refused_when_its_rounds_are_not_its_tokens(
    tokens: tuple[int, ...], rounds: tuple[Round, ...], why: str
):
    message = codec.encode_serving_frames([Progress(1, 4, tokens, (), Cost(1), rounds)])
    [error] = codec.decode_serving_frames(message)
    assert isinstance(error, BadFrame)
    assert why in error.message


async def test_rounds_are_joined_when_their_progress_waits():
    outbox: Outbox[Progress] = Outbox()
    later = replace(ROUND, from_index=7, accepted=(1,), bonus=8)
    outbox.put(1, Progress(1, 4, ROUND.tokens, (), Cost(1), (ROUND,)))
    outbox.put(1, Progress(1, 7, later.tokens, (), Cost(1), (later,)))
    [joined] = await outbox.take()
    assert joined.rounds == (ROUND, later)


def test_a_round_is_told_once_when_its_tokens_are_repeated():
    output, piece = Output(range(4)), Piece()
    progress = Progress(1, 4, ROUND.tokens, (), Cost(1), (ROUND,))
    output.take(progress, piece)
    output.take(progress, piece)
    assert piece.rounds == [ROUND]
