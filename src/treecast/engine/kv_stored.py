"""A pool that is kept in another type than attention computes in (CPU).

A pass widens what its sequences hold, one layer at a time, into a small pool of its own, where
every sequence lies in one run; attention then knows nothing of how keys are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from treecast.engine.kv_dtype import KVFormat
from treecast.engine.kv_tensors import KVTensors, LayerShape
from treecast.kernels.grouping import BLOCK
from treecast.kernels.plan import LayerAttention, SegmentLayout
from treecast.kernels.scores import PLAIN, ScoreRule


class StoredKV:
    """Contents of the pool in another type; a `kv_pool.Storage`, as `KVTensors` is."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_places: int,
        kv_format: KVFormat,
        device: torch.device,
    ) -> None:
        self.format = kv_format
        self._codes = KVTensors(shapes, num_places, kv_format.kept, device)
        scales = [replace(shape, key_dim=1, value_dim=1) for shape in shapes]
        scaled = kv_format.scaled
        self._scales = KVTensors(scales, num_places, torch.float32, device) if scaled else None
        self._parts = [self._codes] if self._scales is None else [self._codes, self._scales]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for part in self._parts:
            part.copy(sources, targets)

    @property
    def position_bytes(self) -> int:
        return sum(part.position_bytes for part in self._parts)

    def save(self, key: int, places: Sequence[int]) -> None:
        """See `kv_pool.Storage.save`."""
        for part in self._parts:
            part.save(key, places)

    def load(self, key: int, places: Sequence[int]) -> None:
        """See `kv_pool.Storage.load`."""
        for part in self._parts:
            part.load(key, places)

    def forget(self, key: int) -> None:
        """See `kv_pool.Storage.forget`."""
        for part in self._parts:
            part.forget(key)

    def read(self, places: Sequence[int]) -> list[Tensor]:
        """Codes, then scales; see `KVTensors.read`."""
        return [plane for part in self._parts for plane in part.read(places)]

    def settle(self) -> None:
        for part in self._parts:
            part.settle()

    def write(self, layer: int, places: Tensor, key: Tensor, value: Tensor) -> None:
        """Keep [KV heads, places, dim] keys and values of a layer."""
        scales = (None, None) if self._scales is None else self._scales.layer(layer)
        for numbers, codes, scale in zip(
            (key, value), self._codes.layer(layer), scales, strict=True
        ):
            quantized, own = self.format.quantize(numbers)
            codes[:, places] = quantized
            if scale is not None and own is not None:
                scale[:, places] = own

    def widened(self, layer: int, places: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[KV heads, places, dim] keys and values of a layer, as they are to be computed with."""
        scales = (None, None) if self._scales is None else self._scales.layer(layer)
        keys, values = (
            self.format.widen(codes[:, places], None if scale is None else scale[:, places], dtype)
            for codes, scale in zip(self._codes.layer(layer), scales, strict=True)
        )
        return keys, values


class StoredPass:
    """A pass over a pool that is widened for it; see `bridge.KernelPass`."""

    def __init__(
        self,
        stored: StoredKV,
        layouts: Sequence[SegmentLayout],
        kernel: Callable[[Sequence[SegmentLayout]], LayerAttention],
        dtype: torch.dtype,
        norm_columns: int = 0,
    ) -> None:
        """Lay a pass out anew.

        Args:
            layouts: as the pool has them.
            kernel: makes the attention of segments.
            dtype: that is computed in.
            norm_columns: of ones, that attention wants behind every value.
        """
        self._stored, self._dtype, self._norm_columns = stored, dtype, norm_columns
        placed, self._num_places = _laid_out(layouts)
        self._kernel = kernel(placed)
        self._places = _tensor(place for one in layouts for place in one.places)
        self._at = _tensor(place for one in placed for place in one.places)
        self._new = _tensor(p for one in layouts for p in one.places[one.first_new_slot :])
        self._new_at = _tensor(p for one in placed for p in one.places[one.first_new_slot :])
        self._pools: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        rule: ScoreRule = PLAIN,
    ) -> Tensor:
        rows, dim = len(self._new), value.shape[-1]
        self._stored.write(layer, self._new, key[0, :, :rows], value[0, :, :rows])
        keys, values = self._pools_of(key.shape[1], key.shape[-1], dim)
        wide_keys, wide_values = self._stored.widened(layer, self._places, self._dtype)
        keys[:, self._at], values[:, self._at, :dim] = wide_keys, wide_values
        out = value.new_empty((1, query.shape[2], query.shape[1], dim))
        out[0, rows:] = 0
        new = keys[:, self._new_at], values[:, self._new_at, :dim]
        self._kernel(query[0], *new, keys, values, scaling, out[0], rule)
        return out

    def _pools_of(self, kv_heads: int, key_dim: int, value_dim: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the pass; layers take turns with them."""
        shape = (kv_heads, key_dim, value_dim)
        if shape not in self._pools:
            places = (kv_heads, self._num_places)
            keys = torch.zeros((*places, key_dim), dtype=self._dtype)
            values = torch.zeros((*places, value_dim + self._norm_columns), dtype=self._dtype)
            values[:, :, value_dim:] = 1
            self._pools[shape] = keys, values
        return self._pools[shape]


def _laid_out(layouts: Sequence[SegmentLayout]) -> tuple[list[SegmentLayout], int]:
    """The same segments, each in one run of whole blocks; and the places that they take."""
    placed, first = [], 0
    for layout in layouts:
        places = range(first, first + layout.num_slots)
        placed.append(replace(layout, first_place=first, places=places))
        first += -(-layout.num_slots // BLOCK) * BLOCK
    return placed, first


def _tensor(places: Iterable[int]) -> Tensor:
    return torch.tensor(list(places), dtype=torch.long)
