"""Training labels: the token that followed, mixed with the target's own probabilities.

A corpus is small beside a draft's capacity; how the target ranks the other tokens is signal that
the text alone does not carry.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treecast.tuning.batches import Batch, make_batch
from treecast.tuning.corpus import Record

_CHUNK_ROWS = 256


@dataclass(frozen=True)
class Labels:
    """Weighted label tokens of each predicted position; a row's weights sum to 1."""

    ids: Tensor  # [num_targets, num_labels] int64
    weights: Tensor  # [num_targets, num_labels] float32


class Teacher:
    """The target's top-k next tokens, worked out when a record first comes up, then kept.

    Mutates its own cache only. The first epoch pays for the target's forward passes.
    """

    def __init__(self, target: Any, records: Sequence[Record], first: int | None, top_k: int):
        self._target = target
        self._records = records
        self._first = first
        self._top_k = top_k
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def labels(self, batch: Batch, share: float) -> Labels:
        """Mix: `share` of the weight on the target's top-k, the rest on the token that followed."""
        self._learn([index for index in batch.indices if index not in self._known])
        ids = torch.cat([self._known[index][0] for index in batch.indices]).long()
        probs = torch.cat([self._known[index][1] for index in batch.indices]).float()
        soft = probs * (share / probs.sum(dim=1, keepdim=True))
        hard = torch.full((len(ids), 1), 1.0 - share)
        return Labels(
            torch.cat([batch.next_ids.unsqueeze(1), ids], dim=1), torch.cat([hard, soft], dim=1)
        )

    def state_dict(self) -> dict[int, tuple[Tensor, Tensor]]:
        return self._known

    def load_state_dict(self, state: dict[int, tuple[Tensor, Tensor]]) -> None:
        self._known = dict(state)

    @torch.no_grad()
    def _learn(self, indices: Sequence[int]) -> None:
        if not indices:
            return
        batch = make_batch(self._records, indices, self._first)
        hidden = self._target.base_model(input_ids=batch.input_ids, use_cache=False)[0]
        rows = hidden.flatten(0, 1)[batch.places]
        head = self._target.get_output_embeddings().weight
        ids, probs = _top_probs(rows, head, self._top_k)
        owner = batch.places // batch.input_ids.shape[1]
        for row, index in enumerate(indices):
            self._known[index] = (ids[owner == row], probs[owner == row])


def hard_labels(batch: Batch) -> Labels:
    """All weight on the token that followed."""
    ids = batch.next_ids.unsqueeze(1)
    return Labels(ids, torch.ones(ids.shape))


def _top_probs(rows: Tensor, head: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """[num_rows, top_k] token ids and probabilities, a chunk of rows at a time."""
    ids, probs = [], []
    for start in range(0, len(rows), _CHUNK_ROWS):
        logits = rows[start : start + _CHUNK_ROWS] @ head.T
        top = torch.softmax(logits.float(), dim=-1).topk(top_k, dim=-1)
        ids.append(top.indices.to(torch.int32))
        probs.append(top.values.half())
    return torch.cat(ids), torch.cat(probs)
