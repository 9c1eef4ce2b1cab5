"""How often the held-out token is among the first guesses of a draft, or of several."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from treecast.tuning.batches import Batch, make_batch
from treecast.tuning.corpus import Record

NUM_GUESSES = 5
_CHUNK_ROWS = 256


@torch.no_grad()
def guesses_of(draft: Any, batch: Batch, head: Tensor, num_guesses: int = NUM_GUESSES) -> Tensor:
    """[num_targets, num_guesses] rows of `head`, likeliest first, given the true prefix.

    Logits are compared in the head's type: in bfloat16 the top ones often tie.
    """
    hidden = draft.base_model(input_ids=batch.input_ids, use_cache=False)[0]
    rows = hidden.flatten(0, 1)[batch.places].to(head.dtype)
    return torch.cat(
        [
            (chunk @ head.T).topk(num_guesses, dim=-1).indices
            for chunk in torch.split(rows, _CHUNK_ROWS)
        ]
    )


def heldout_guesses(
    draft: Any,
    records: Sequence[Record],
    indices: Sequence[int],
    token_ids: Tensor | None = None,
    num_guesses: int = NUM_GUESSES,
    batch_size: int = 8,
) -> Tensor:
    """[num_targets, num_guesses] guessed token ids for every completion token of the records.

    Args:
        token_ids: the tokens that the draft can propose; None is all.
    """
    head = draft.get_output_embeddings().weight
    head = (head if token_ids is None else head[token_ids]).float()
    found = []
    for start in range(0, len(indices), batch_size):
        batch = make_batch(records, indices[start : start + batch_size], first=None)
        rows = guesses_of(draft, batch, head, num_guesses)
        found.append(rows if token_ids is None else token_ids[rows])
    return torch.cat(found)


def completion_tokens(records: Sequence[Record], indices: Sequence[int]) -> Tensor:
    """[num_targets] what `heldout_guesses` guesses at."""
    return torch.cat([torch.tensor(records[i].completion_ids) for i in indices])


def success(guesses: Tensor, truth: Tensor) -> tuple[float, ...]:
    """Share of tokens within the first 1, 2, .. guesses; never falls."""
    hits = (guesses == truth.unsqueeze(1)).sum(dim=0).cumsum(dim=0)
    return tuple((hits / len(truth)).tolist())


def union_success(guesses: Sequence[Tensor], truth: Tensor) -> tuple[float, ...]:
    """Share of tokens within the first 1, 2, .. guesses of at least one draft."""
    hit = torch.stack([(each == truth.unsqueeze(1)).cumsum(dim=1) > 0 for each in guesses])
    return tuple((hit.any(dim=0).sum(dim=0) / len(truth)).tolist())


def union_sizes(guesses: Sequence[Tensor]) -> tuple[float, ...]:
    """Distinct guesses in the union of the drafts' first 1, 2, .., on average."""
    sizes = []
    for count in range(1, guesses[0].shape[1] + 1):
        ordered = torch.cat([each[:, :count] for each in guesses], dim=1).sort(dim=1).values
        new = (ordered[:, 1:] != ordered[:, :-1]).sum(dim=1) + 1
        sizes.append(float(new.float().mean()))
    return tuple(sizes)
