"""Training labels: the token that followed, mixed with the target's own probabilities.

A corpus is small beside a draft's capacity; how the target ranks the other tokens is signal that
the text alone does not carry.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treecast.tuning.batch_decode import top_probs
from treecast.tuning.batches import Batch, first_target, make_batch
from treecast.tuning.corpus import Record

_CHUNK_ROWS = 256

Known = tuple[Tensor, Tensor]  # [num_targets, top_k] token ids (int32) and probabilities (half)


@dataclass(frozen=True)
class Labels:
    """Weighted label tokens of each predicted position; a row's weights sum to 1."""

    ids: Tensor  # [num_targets, num_labels] int64
    weights: Tensor  # [num_targets, num_labels] float32


class Teacher:
    """The target's top-k next tokens: as the corpus has them, or else worked out, then kept.

    Mutates its own cache only. Where the corpus has none that this target noted, the first epoch
    pays for its forward passes.
    """

    def __init__(
        self,
        target: Any,
        revision: str,
        records: Sequence[Record],
        first: int | None,
        top_k: int,
    ) -> None:
        self._target = target
        self._revision = revision
        self._records = records
        self._first = first
        self._top_k = top_k
        self._known: dict[int, Known] = {}
        self._unsaved: dict[int, Known] = {}

    def labels(self, batch: Batch, share: float) -> Labels:
        """Mix: `share` of the weight on the target's top-k, the rest on the token that followed."""
        self._learn([index for index in batch.indices if not self._knows(index)])
        known = [self._known[index] for index in batch.indices]
        ids = torch.cat([ids for ids, _ in known])[batch.kept].long()
        probs = torch.cat([probs for _, probs in known])[batch.kept].float()
        soft = probs * (share / probs.sum(dim=1, keepdim=True))
        hard = torch.full((len(ids), 1), 1.0 - share)
        return Labels(
            torch.cat([batch.next_ids.unsqueeze(1), ids], dim=1), torch.cat([hard, soft], dim=1)
        )

    def take_unsaved(self) -> dict[int, Known]:
        """What was worked out since the last call."""
        unsaved, self._unsaved = self._unsaved, {}
        return unsaved

    def restore(self, saved: dict[int, Known]) -> None:
        """Take back what an earlier run worked out."""
        self._known.update(saved)

    def _knows(self, index: int) -> bool:
        """Whether a record's labels are at hand; takes them from the corpus if it has them."""
        if index in self._known:
            return True
        record = self._records[index]
        num_targets = len(record.token_ids) - first_target(record, self._first)
        top = record.top
        if top is None or top.revision != self._revision:
            return False
        if len(top.ids) < num_targets or top.ids.shape[1] < self._top_k:
            return False
        rows = slice(len(top.ids) - num_targets, None)
        self._known[index] = (
            torch.from_numpy(top.ids[rows, : self._top_k].copy()),
            torch.from_numpy(top.probs[rows, : self._top_k].copy()),
        )
        return True

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
            # Cloned: a view would keep the whole batch alive, and be saved with it.
            known = (ids[owner == row].clone(), probs[owner == row].clone())
            self._known[index] = self._unsaved[index] = known


def hard_labels(batch: Batch) -> Labels:
    """All weight on the token that followed."""
    ids = batch.next_ids.unsqueeze(1)
    return Labels(ids, torch.ones(ids.shape))


def _top_probs(rows: Tensor, head: Tensor, top_k: int) -> Known:
    """[num_rows, top_k] token ids and probabilities, a chunk of rows at a time."""
    parts = [top_probs(chunk @ head.T, top_k) for chunk in torch.split(rows, _CHUNK_ROWS)]
    return torch.cat([ids for ids, _ in parts]), torch.cat([probs for _, probs in parts])
