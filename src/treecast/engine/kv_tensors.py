"""The tensors of a KV pool: every layer's keys and values, place by place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a position; `group` query heads share a KV head."""

    kv_heads: int
    key_dim: int
    value_dim: int
    group: int = 1


class KVTensors:
    """Contents of the pool; a `kv_pool.Storage`.

    Planes ([places, dim]) of all layers and heads with one dim lie in one tensor, so that a copy
    of places is one operation for all layers.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_places: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._moves: dict[int, int] = {}
        """Source of each target of the copies to be made; sources as they are now."""
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
        """Copy places in all layers; all are read before any is written.

        Done when next settled, so that the commits of a step are one copy.
        """
        found = [self._moves.get(source, source) for source in sources]
        self._moves.update(zip(targets, found, strict=True))

    def settle(self) -> None:
        """Carry out the copies asked for; before the pool is read or written."""
        if not self._moves:
            return
        for plane in self._planes.values():
            source = torch.tensor(list(self._moves.values()), device=plane.device)
            target = torch.tensor(list(self._moves), device=plane.device)
            plane.index_copy_(1, target, plane.index_select(1, source))
        self._moves.clear()


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU their memory is taken only once written to.

    Zeros rather than whatever is there: a key that nobody sees is multiplied by zero, and zero
    times a stray NaN is none.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(int(np.prod(shape)) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
