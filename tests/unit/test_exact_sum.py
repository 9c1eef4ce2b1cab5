"""Sums over logical blocks: a row's must not depend on the rows beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from treecast.kernels.exact import add_in_order


def row_counts_that_change_bits(add: Callable[[Tensor], Tensor]) -> list[tuple[int, int]]:
    """(dim, rows) whose sums differ from those of the same rows among many."""
    changed = []
    for dim in (1, 64):
        parts = torch.rand(13, 3, 400, dim, generator=torch.Generator().manual_seed(dim))
        among_many = add(parts.clone())
        for rows in range(16, 400, 16):
            alone = add(parts[:, :, :rows].clone(memory_format=torch.contiguous_format))
            if not torch.equal(alone, among_many[:, :rows]):
                changed.append((dim, rows))
    return changed


def test_a_rows_sums_keep_their_bits_whatever_rows_are_beside_it() -> None:
    assert row_counts_that_change_bits(add_in_order) == []


def test_torchs_own_sum_would_not() -> None:
    """The negative control: it adds in another order where a vector's width does not fit."""
    assert row_counts_that_change_bits(lambda parts: parts.sum(0))
