"""The replay law: plain decoding, run along a tree for as far as the tree foresaw it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treecast.errors import InvalidTree
from treecast.sampling.pick import Picker
from treecast.tree import TokenTree


@dataclass(frozen=True, slots=True)
class Replay:
    """The tokens are the target's own picks, so those of plain decoding whatever the tree holds.

    Source: Daliri et al. 2024 (arXiv 2408.07978).
    """

    def check(self, tree: TokenTree) -> None:
        """Every tree will do but one of draws: those would be verified whole, before better ones.

        Raises:
            InvalidTree: it has groups of draws.
        """
        if tree.groups:
            raise InvalidTree(f"tree has {len(tree.groups)} groups of draws; law replay takes none")

    def takes_likeliest(self, picker: Picker) -> bool:
        """As the picker does."""
        return picker.takes_likeliest

    def next_token(
        self, tree: TokenTree, node: int, logits: NDArray[np.float32], picker: Picker
    ) -> int:
        """What the target picks after its own text; the tree is not looked at."""
        return picker.pick(logits)
