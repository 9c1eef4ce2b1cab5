"""A frozen head cut down to the tokens that a corpus uses.

A corpus of a few hundred thousand tokens uses a quarter of a 49k vocabulary, and a smaller share
of a larger one; the other rows are most of a training step's cost.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from treecast.tuning.corpus import Record
from treecast.tuning.labels import Labels


class CutHead:
    """Rows of the head for the corpus's own tokens, and labels renumbered to fit."""

    def __init__(self, head: Tensor, records: Sequence[Record]) -> None:
        used = torch.zeros(len(head), dtype=torch.bool)
        for record in records:
            used[torch.tensor(record.token_ids)] = True
        token_ids = used.nonzero().flatten()
        self.weight = head.detach()[token_ids].contiguous()  # [num_used, hidden_size]
        self._row = torch.full((len(head),), -1)
        self._row[token_ids] = torch.arange(len(token_ids))

    def renumber(self, labels: Labels) -> Labels:
        """Labels as rows of `weight`; the weight of tokens cut away goes to the others.

        The token that followed is always in the corpus, so a row never loses all its weight.
        """
        rows = self._row[labels.ids]
        weights = labels.weights * (rows >= 0)
        weights = weights / weights.sum(dim=1, keepdim=True)
        return Labels(rows.clamp_min(0), weights)
