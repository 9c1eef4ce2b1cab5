"""The walk by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from treecast.sampling.laws import Walk, walk
from treecast.sampling.noise import noise_key
from treecast.sampling.params import SamplingParams
from treecast.sampling.pick import Picker
from treecast.sampling.replay import Replay
from treecast.sampling.stops import FinishReason, Stop, StopRules
from treecast.sampling.transforms import Context
from treecast.tree import ROOT, TokenTree

VOCAB = 5


class FavouredRows:
    """Row i favours `favoured[i]`, then the token above it; notes which rows were asked for."""

    def __init__(self, *favoured: int) -> None:
        self._favoured = favoured
        self.asked: list[int] = []

    def __getitem__(self, row: int, /) -> NDArray[np.float32]:
        self.asked.append(row)
        logits = np.zeros(VOCAB, np.float32)
        logits[self._favoured[row]] = 2
        logits[(self._favoured[row] + 1) % VOCAB] = 1
        return logits


# The root's children are 2 and 1; below 2 are 3 and 4; below 1 is 0.
TREE = TokenTree.build([2, 1, 3, 4, 0], [ROOT, ROOT, 0, 0, 1])


def follow(
    rows: FavouredRows,
    tree: TokenTree = TREE,
    sampling: SamplingParams | None = None,
    eos: frozenset[int] = frozenset(),
) -> tuple[Walk, Picker]:
    sampling = sampling or SamplingParams(temperature=0, max_tokens=100)
    picker = Picker(sampling, noise_key(0), Context([0, 0]))
    return walk(tree, rows, picker, StopRules(eos, sampling).check, Replay()), picker


def test_walk_yields_the_bonus_token_alone_when_there_is_no_tree() -> None:
    walked, picker = follow(FavouredRows(3), TokenTree())
    assert walked == Walk([3], [], [], None)
    assert picker.context.length == 3


def test_walk_follows_the_picks_when_the_tree_holds_them() -> None:
    rows = FavouredRows(2, 4, 0, 0, 1, 0)
    walked, picker = follow(rows)
    assert walked == Walk([2, 4, 1], [0, 3], [], None)
    assert rows.asked == [0, 1, 4]
    assert picker.context.length == 5


def test_walk_ends_at_the_first_pick_that_the_tree_lacks() -> None:
    rows = FavouredRows(2, 0, 0, 0, 0, 0)
    assert follow(rows)[0] == Walk([2, 0], [0], [], None)
    assert rows.asked == [0, 1]


def test_walk_accepts_nothing_when_no_child_is_picked() -> None:
    assert follow(FavouredRows(3, 0, 0, 0, 0, 0))[0] == Walk([3], [], [], None)


def test_walk_stops_inside_an_accepted_path_when_a_token_ends_the_output() -> None:
    rows = FavouredRows(2, 4, 0, 0, 1, 0)
    walked, _ = follow(rows, eos=frozenset({4}))
    assert walked == Walk([2, 4], [0], [], Stop(FinishReason.STOP_TOKEN))
    assert rows.asked == [0, 1]


def test_walk_stops_at_the_root_when_its_pick_ends_the_output() -> None:
    walked, _ = follow(FavouredRows(2, 4, 0, 0, 1, 0), eos=frozenset({2}))
    assert walked == Walk([2], [], [], Stop(FinishReason.STOP_TOKEN))


def test_walk_stops_inside_an_accepted_path_when_the_length_is_reached() -> None:
    sampling = SamplingParams(temperature=0, max_tokens=2)
    walked, _ = follow(FavouredRows(2, 4, 0, 0, 1, 0), sampling=sampling)
    assert walked == Walk([2, 4], [0], [], Stop(FinishReason.LENGTH))


def test_walk_penalises_what_it_accepted_when_penalties_are_asked() -> None:
    chain = TokenTree.chain([2, 2, 2])
    rows = FavouredRows(2, 2, 2, 2)
    sampling = SamplingParams(temperature=0, presence_penalty=1.5)
    assert follow(rows, chain, sampling)[0].tokens == [2, 3]
    assert follow(FavouredRows(2, 2, 2, 2), chain)[0].tokens == [2, 2, 2, 2]


def test_walk_reports_logprobs_of_the_plain_softmax_when_asked() -> None:
    sampling = SamplingParams(temperature=0, presence_penalty=1.5, logprobs=2)
    walked, _ = follow(FavouredRows(2, 2, 2), TokenTree.chain([2, 2]), sampling)
    normaliser = np.log(np.exp([2, 1, 0, 0, 0]).sum())
    assert [entry.chosen for entry in walked.logprobs] == pytest.approx(
        [2 - normaliser, 1 - normaliser]
    )
    assert [entry.top_ids for entry in walked.logprobs] == [(2, 3), (2, 3)]
