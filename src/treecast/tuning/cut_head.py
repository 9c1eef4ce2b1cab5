"""A frozen head cut down to the tokens that matter.

A corpus of a few hundred thousand tokens uses a quarter of a 49k vocabulary, and a smaller share
of a larger one; the other rows are most of a training step's cost, and of a drafting step's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treecast.errors import ModelError
from treecast.tuning.corpus import Record
from treecast.tuning.labels import Labels


@dataclass(frozen=True)
class CutLabels:
    """Labels as rows of a cut head, of those positions that kept some weight."""

    labels: Labels
    kept: Tensor  # [num_targets] bool


class HeadRows:
    """Some rows of a head, and labels renumbered to fit."""

    def __init__(self, head: Tensor, token_ids: Tensor) -> None:
        """`token_ids` [num_rows] ascending."""
        self.token_ids = token_ids
        self.weight = head.detach()[token_ids].contiguous()  # [num_rows, hidden_size]
        self._row = torch.full((len(head),), -1)
        self._row[token_ids] = torch.arange(len(token_ids))

    def renumber(self, labels: Labels) -> CutLabels:
        """The weight of tokens cut away goes to the position's others; one with none is left out.

        Where the head has all tokens of the corpus, none is.
        """
        rows = self._row[labels.ids]
        weights = labels.weights * (rows >= 0)
        total = weights.sum(dim=1, keepdim=True)
        kept = total.squeeze(1) > 0
        return CutLabels(Labels(rows.clamp_min(0)[kept], (weights / total)[kept]), kept)


def used_tokens(records: Sequence[Record], vocab_size: int) -> Tensor:
    """Ids, ascending, of every token in the records."""
    return _counts(records, vocab_size).nonzero().flatten()


def frequent_tokens(records: Sequence[Record], vocab_size: int, num_tokens: int) -> Tensor:
    """Ids, ascending, of the most frequent tokens; of equally frequent ones, the lowest ids.

    Raises:
        ModelError: more are asked for than there are, or fewer than 5.
    """
    if not 5 <= num_tokens <= vocab_size:
        raise ModelError(f"a head of {num_tokens} tokens is out of range; allowed: 5..{vocab_size}")
    order = _counts(records, vocab_size).argsort(descending=True, stable=True)
    return order[:num_tokens].sort().values


def _counts(records: Sequence[Record], vocab_size: int) -> Tensor:
    ids = torch.tensor([token for record in records for token in record.token_ids])
    return torch.bincount(ids, minlength=vocab_size)
