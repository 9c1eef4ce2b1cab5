"""The tensors of a KV pool: every layer's keys and values, place by place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from treecast.engine.host_kv import HostKV


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a position; `group` query heads share a KV head."""

    kv_heads: int
    key_dim: int
    value_dim: int
    group: int = 1


@dataclass(frozen=True, slots=True)
class _Moves:
    """Copies to be made and places to be saved, all by their contents before any of them.

    Attributes:
        copies: source of each target.
        saves: places by key.
    """

    copies: dict[int, int] = field(default_factory=dict)
    saves: dict[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Load:
    key: int
    places: list[int]


class KVTensors:
    """Contents of the pool; a `kv_pool.Storage`.

    Planes ([places, dim]) of all layers and heads with one dim lie in one tensor, so that a copy
    of places is one operation for all layers. What is asked for is done when next settled, by the
    thread that computes: so the commits of a step are one copy, and who asks waits for nothing.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_places: int,
        dtype: torch.dtype,
        device: torch.device,
        lossy_swap: bool = False,
    ) -> None:
        """`lossy_swap`: what is saved is rounded to int8."""
        self._waiting: list[_Moves | _Load] = []
        """In order; two loads have one batch of moves between them at most."""
        planes: dict[int, int] = {}
        starts: list[tuple[int, int]] = []
        for shape in shapes:
            key_start = planes.get(shape.key_dim, 0)
            planes[shape.key_dim] = key_start + shape.kv_heads
            value_start = planes.get(shape.value_dim, 0)
            planes[shape.value_dim] = value_start + shape.kv_heads
            starts.append((key_start, value_start))
        self._planes = {
            dim: _lazy_zeros((count, num_places, dim), dtype, device)
            for dim, count in planes.items()
        }
        self._host = HostKV(list(self._planes.values()), lossy_swap)
        self._layers = [
            (
                self._planes[shape.key_dim][key_start : key_start + shape.kv_heads],
                self._planes[shape.value_dim][value_start : value_start + shape.kv_heads],
            )
            for shape, (key_start, value_start) in zip(shapes, starts, strict=True)
        ]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer: [KV heads, places, dim] each, views to read and write."""
        return self._layers[index]

    def read(self, places: Sequence[int]) -> list[Tensor]:
        """[planes, places, dim] contents, one tensor per dim: for comparisons."""
        self.settle()
        return [plane[:, list(places)] for plane in self._planes.values()]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy places in all layers; all are read before any is written."""
        copies = self._last_moves().copies
        found = [copies.get(source, source) for source in sources]
        copies.update(zip(targets, found, strict=True))

    @property
    def position_bytes(self) -> int:
        return self._host.position_bytes

    def save(self, key: int, places: Sequence[int]) -> None:
        """See `kv_pool.Storage.save`."""
        moves = self._last_moves()
        moves.saves[key] = [moves.copies.get(place, place) for place in places]

    def load(self, key: int, places: Sequence[int]) -> None:
        """See `kv_pool.Storage.load`."""
        self._waiting.append(_Load(key, list(places)))

    def forget(self, key: int) -> None:
        """See `kv_pool.Storage.forget`."""
        for step in self._waiting:
            if isinstance(step, _Moves):
                step.saves.pop(key, None)
        self._host.forget(key)

    def settle(self) -> None:
        """Do what was asked for; before the pool is read or written."""
        waiting, self._waiting = self._waiting, []
        for step in waiting:
            if isinstance(step, _Load):
                self._host.load(step.key, step.places)
            else:
                self._move(step)

    def _last_moves(self) -> _Moves:
        last = self._waiting[-1] if self._waiting else None
        if isinstance(last, _Moves):
            return last
        self._waiting.append(moves := _Moves())
        return moves

    def _move(self, moves: _Moves) -> None:
        for key, places in moves.saves.items():
            self._host.save(key, places)
        if not moves.copies:
            return
        for plane in self._planes.values():
            source = torch.tensor(list(moves.copies.values()), device=plane.device)
            target = torch.tensor(list(moves.copies), device=plane.device)
            plane.index_copy_(1, target, plane.index_select(1, source))


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU their memory is taken only once written to.

    Zeros rather than whatever is there: a key that nobody sees is multiplied by zero, and zero
    times a stray NaN is none.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
