"""A draft's output head cut to the tokens that it can propose.

A full head is most of what a small draft costs. The cut one computes its own rows alone; every
other token gets -inf, so that whatever reads the logits sees the target's vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from treecast.checkpoints import HEAD_TOKENS
from treecast.errors import ModelError


class CutHead(nn.Module):
    """Logits of some tokens, among -inf for the others."""

    def __init__(self, head: nn.Linear, token_ids: Tensor) -> None:
        """`token_ids` [num_rows] ascending; `head` is left as it is."""
        super().__init__()
        self.rows = nn.Linear(
            head.in_features, len(token_ids), bias=False, dtype=head.weight.dtype
        ).requires_grad_(False)
        self.rows.weight.copy_(head.weight[token_ids])
        self.vocab_size = head.out_features
        self.register_buffer("token_ids", token_ids, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] to [..., vocab_size]."""
        logits = hidden.new_full((*hidden.shape[:-1], self.vocab_size), -torch.inf)
        return logits.index_copy_(-1, self.get_buffer("token_ids"), self.rows(hidden))


@torch.no_grad()
def cut_head(model: Any) -> None:
    """Cut a model's head in place, where its config names the tokens to keep.

    Raises:
        ModelError: a token that the vocabulary lacks, ids out of order, or a head with a bias.
    """
    token_ids = getattr(model.config, HEAD_TOKENS, None)
    if token_ids is None:
        return
    head = model.get_output_embeddings()
    kept = torch.tensor(token_ids, dtype=torch.long)
    if not len(kept) or bool((kept.diff() <= 0).any()):
        raise ModelError(f"{HEAD_TOKENS} are {len(kept)} ids that do not ascend")
    if not 0 <= int(kept[0]) <= int(kept[-1]) < head.out_features:
        raise ModelError(
            f"{HEAD_TOKENS} go from {int(kept[0])} to {int(kept[-1])}; "
            f"the vocabulary has {head.out_features}"
        )
    if head.bias is not None:
        raise ModelError("a head with a bias cannot be cut")
    model.set_output_embeddings(CutHead(head, kept).to(head.weight.device))
