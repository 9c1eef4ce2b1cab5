"""Records cut into training batches: which positions are predicted, and in what order."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treecast.errors import CorpusError
from treecast.tuning.corpus import Record

_WINDOW_BATCHES = 16


@dataclass(frozen=True)
class Batch:
    """Records padded on the right to one width, and the positions to predict from."""

    indices: tuple[int, ...]  # of the records
    input_ids: Tensor  # [num_records, width]
    places: Tensor  # [num_targets] into the flattened input_ids, record by record
    next_ids: Tensor  # [num_targets] the token that follows each place


@dataclass(frozen=True)
class Split:
    """Indices of the records to train on, and of those held out."""

    train: tuple[int, ...]
    heldout: tuple[int, ...]


def split_records(num_records: int, heldout_fraction: float, seed: int) -> Split:
    """Hold out a random share, at least one record; the same seed gives the same share.

    Raises:
        CorpusError: fewer than two records, so that nothing would be left to train on.
    """
    if num_records < 2:
        raise CorpusError(f"the corpus has {num_records} complete record; tuning needs at least 2")
    order = list(range(num_records))
    random.Random(seed).shuffle(order)
    num_heldout = max(1, int(num_records * heldout_fraction))
    return Split(tuple(order[num_heldout:]), tuple(order[:num_heldout]))


def shared_prefix(records: Sequence[Record]) -> int:
    """How many first tokens all prompts have in common: the chat template's opening."""
    first, last = (pick(record.prompt_ids for record in records) for pick in (min, max))
    for place, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return place
    return min(len(first), len(last))


def epoch_batches(
    records: Sequence[Record], indices: Sequence[int], batch_size: int, seed: str
) -> list[tuple[int, ...]]:
    """Shuffle, then group records of like length, so that little of a batch is padding.

    The same seed gives the same batches, which is how a resumed run finds its place.
    """
    rng = random.Random(seed)
    order = list(indices)
    rng.shuffle(order)
    batches: list[tuple[int, ...]] = []
    window = batch_size * _WINDOW_BATCHES
    for start in range(0, len(order), window):
        alike = sorted(order[start : start + window], key=lambda i: len(records[i].token_ids))
        batches += [tuple(alike[i : i + batch_size]) for i in range(0, len(alike), batch_size)]
    rng.shuffle(batches)
    return batches


def make_batch(records: Sequence[Record], indices: Sequence[int], first: int | None) -> Batch:
    """Pad the records to one width.

    Args:
        first: predict every token from this place on; None predicts the completion alone.
    """
    chosen = [records[i] for i in indices]
    width = max(len(record.token_ids) for record in chosen)
    input_ids = torch.zeros(len(chosen), width, dtype=torch.long)
    places, next_ids = [], []
    for row, record in enumerate(chosen):
        ids = torch.tensor(record.token_ids)
        input_ids[row, : len(ids)] = ids
        start = len(record.prompt_ids) if first is None else max(first, 1)
        places.append(row * width + torch.arange(start - 1, len(ids) - 1))
        next_ids.append(ids[start:])
    return Batch(tuple(indices), input_ids, torch.cat(places), torch.cat(next_ids))
