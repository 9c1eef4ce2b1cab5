"""How often the held-out token is among a draft's first 1..5 guesses."""

from collections.abc import Sequence
from typing import Any

import torch

from treecast.tuning.batches import make_batch
from treecast.tuning.corpus import Record

NUM_GUESSES = 5
_CHUNK_ROWS = 256


@torch.no_grad()
def top_success(
    draft: Any, records: Sequence[Record], indices: Sequence[int], batch_size: int = 8
) -> tuple[float, ...]:
    """Share of completion tokens within the draft's top 1, 2, .. 5, given the true prefix.

    Logits are compared in float32: in bfloat16 the top ones often tie.

    Returns:
        5 shares, non-decreasing.
    """
    head = draft.get_output_embeddings().weight.float()
    hits = torch.zeros(NUM_GUESSES, dtype=torch.int64)
    num_targets = 0
    for start in range(0, len(indices), batch_size):
        batch = make_batch(records, indices[start : start + batch_size], first=None)
        hidden = draft.base_model(input_ids=batch.input_ids, use_cache=False)[0]
        rows = hidden.flatten(0, 1)[batch.places].float()
        for first in range(0, len(rows), _CHUNK_ROWS):
            chunk = slice(first, first + _CHUNK_ROWS)
            guesses = (rows[chunk] @ head.T).topk(NUM_GUESSES, dim=-1).indices
            hits += (guesses == batch.next_ids[chunk].unsqueeze(1)).sum(dim=0)
        num_targets += len(rows)
    return tuple((hits.cumsum(dim=0) / num_targets).tolist())
