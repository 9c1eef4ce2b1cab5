"""Records cut into training batches: which positions are predicted, and in what order."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from treecast.errors import CorpusError
from treecast.tuning.corpus import Record

_WINDOW_BATCHES = 16


@dataclass(frozen=True)
class Batch:
    """Records padded on the right to one width, and the positions to predict from.

    `kept` tells, for every position that could be predicted, whether it is among `places`.
    """

    indices: tuple[int, ...]  # of the records
    input_ids: Tensor  # [num_records, width]
    places: Tensor  # [num_targets] into the flattened input_ids, record by record
    next_ids: Tensor  # [num_targets] the token that follows each place
    kept: Tensor  # [num_targets + num_dropped] bool


@dataclass(frozen=True)
class Split:
    """Indices of the records to train on, and of those held out."""

    train: tuple[int, ...]
    heldout: tuple[int, ...]


def split_records(records: Sequence[Record], fraction: float, limit: int, seed: int) -> Split:
    """Hold out a random share of the prompts, at least one; the same seed gives the same share.

    Records of one prompt stay on one side, and of those held out only greedy answers are kept:
    they are what success is measured on.

    Raises:
        CorpusError: fewer than two prompts, or no greedy answer among those held out.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, record in enumerate(records):
        by_prompt.setdefault(record.prompt_ids, []).append(index)
    if len(by_prompt) < 2:
        raise CorpusError(f"the corpus has {len(by_prompt)} complete record; tuning needs 2")
    order = list(by_prompt.values())
    random.Random(seed).shuffle(order)
    num_heldout = max(1, min(limit, int(len(order) * fraction)))
    heldout = tuple(i for indices in order[:num_heldout] for i in indices)
    greedy = tuple(i for i in heldout if records[i].temperature == 0.0)
    if not greedy:
        raise CorpusError(f"none of the {len(heldout)} records held out was answered greedily")
    return Split(tuple(i for indices in order[num_heldout:] for i in indices), greedy)


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


def make_batch(
    records: Sequence[Record],
    indices: Sequence[int],
    first: int | None,
    dropped: Mapping[int, Tensor] | None = None,
) -> Batch:
    """Pad the records to one width.

    Args:
        first: predict every token from this place on; None predicts the completion alone.
        dropped: by record, which of its positions not to predict (bool).
    """
    chosen = [records[i] for i in indices]
    width = max(len(record.token_ids) for record in chosen)
    input_ids = torch.zeros(len(chosen), width, dtype=torch.long)
    places, next_ids, kept = [], [], []
    for row, (index, record) in enumerate(zip(indices, chosen, strict=True)):
        ids = torch.tensor(record.token_ids)
        input_ids[row, : len(ids)] = ids
        start = first_target(record, first)
        places.append(row * width + torch.arange(start - 1, len(ids) - 1))
        next_ids.append(ids[start:])
        gone = dropped.get(index) if dropped else None
        kept.append(torch.ones(len(ids) - start, dtype=torch.bool) if gone is None else ~gone)
    keep = torch.cat(kept)
    return Batch(
        tuple(indices), input_ids, torch.cat(places)[keep], torch.cat(next_ids)[keep], keep
    )


def first_target(record: Record, first: int | None) -> int:
    """Place of the first token of a record that is predicted."""
    return len(record.prompt_ids) if first is None else max(first, 1)
