"""Orders on their way from rank 0 to the others, and proof that all are in step."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from treecast.engine.sharding.orders import Order, Words, decode, encode
from treecast.engine.sharding.world import World
from treecast.errors import EngineLost

_HEAD = 4
_BLOCK = 512
"""Words of the first broadcast; most orders need no second one."""

_SAMPLED = 64
"""Columns of a pass's logits that every rank compares."""


class Line:
    """Orders in their order.

    Each travels with its number, a checksum of all words so far, and one of the last pass's
    logits. A rank that has counted or computed otherwise ends instead of going on.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._number = 0
        self._checksum = 0
        self._computed = 0

    def computed(self, logits: Tensor) -> None:
        """Take note of what came out of a pass; no rows on a rank that does not have it."""
        if not len(logits):
            return
        columns = torch.arange(0, logits.shape[-1], max(1, logits.shape[-1] // _SAMPLED))
        sample = logits[:, columns.to(logits.device)].float().cpu().contiguous()
        self._computed = zlib.crc32(sample.numpy().tobytes())

    def send(self, order: Order) -> None:
        """Rank 0: tell the others. Blocks until they take it."""
        words = encode(order)
        head = [self._number, self._count(words), self._computed, len(words)]
        block = np.zeros(max(_BLOCK, _HEAD + len(words)), dtype=np.int64)
        block[: _HEAD + len(words)] = [*head, *words]
        self._world.say(torch.from_numpy(block[:_BLOCK]))
        if len(block) > _BLOCK:
            self._world.say(torch.from_numpy(block[_BLOCK:]))

    def receive(self) -> Order:
        """Any other rank: the next order. Blocks until it comes.

        Raises:
            EngineLost: we are out of step with rank 0.
        """
        block = torch.zeros(_BLOCK, dtype=torch.int64)
        self._world.say(block)
        number, checksum, computed, length = block[:_HEAD].tolist()
        if _HEAD + length > _BLOCK:
            rest = torch.zeros(_HEAD + length - _BLOCK, dtype=torch.int64)
            self._world.say(rest)
            block = torch.cat([block, rest])
        words = block[_HEAD : _HEAD + length].numpy()
        self._compare("order", self._number, number)
        self._compare("checksum of all orders", self._count(words), checksum)
        if self._computed:
            self._compare("checksum of the last logits", self._computed, computed)
        return decode(words)

    def _count(self, words: Words) -> int:
        self._number += 1
        self._checksum = zlib.crc32(words.tobytes(), self._checksum)
        return self._checksum

    def _compare(self, what: str, ours: int, theirs: int) -> None:
        if ours != theirs:
            rank = self._world.place.rank
            raise EngineLost(
                f"rank {rank} is out of step: {what} is {ours} here, {theirs} at rank 0"
            )
