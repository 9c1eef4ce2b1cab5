"""The walk takes tokens that an engine has found already, and only where they are the pick."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from treecast.sampling.laws import walk
from treecast.sampling.params import SamplingParams
from treecast.sampling.pick import Picker
from treecast.sampling.replay import Replay
from treecast.sampling.transforms import Context
from treecast.tree import ROOT, TokenTree

LOGITS = np.array([[0, 3, 1, 0], [0, 0, 1, 3], [2, 0, 0, 0]], dtype=np.float32)


@dataclass
class Ranked:
    """Rows that are on a device; which of them were fetched is written down."""

    fetched: list[int] = field(default_factory=list)

    def __getitem__(self, row: int, /) -> NDArray[np.float32]:
        self.fetched.append(row)
        return LOGITS[row]

    def likeliest(self, row: int, /) -> int | None:
        return int(LOGITS[row].argmax())


def walked(sampling: SamplingParams) -> tuple[list[int], list[int]]:
    rows = Ranked()
    tree = TokenTree.build([1, 3], [ROOT, 0])
    picker = Picker(sampling, 0, Context([1]))
    done = walk(tree, rows, picker, lambda token: None, Replay())
    plain = walk(tree, LOGITS, Picker(sampling, 0, Context([1])), lambda token: None, Replay())
    assert done == plain
    return done.tokens, rows.fetched


def test_no_row_is_fetched_when_the_pick_is_the_likeliest() -> None:
    assert walked(SamplingParams(temperature=0)) == ([1, 3, 0], [])


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1),
        SamplingParams(temperature=0, logit_bias={2: 9}),
        SamplingParams(temperature=0, presence_penalty=1),
        SamplingParams(temperature=0, logprobs=0),
        SamplingParams(temperature=0, regex="a+"),
    ],
)
def test_rows_are_fetched_when_the_pick_needs_them(sampling: SamplingParams) -> None:
    assert walked(sampling)[1]
