"""Keys and values that were swapped out of the pool, in host memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from treecast.engine.kv_dtype import KVFormat
from treecast.errors import EngineLost

_CHUNK = 1024
"""Positions that are gathered on the device at a time: its memory is full when this is needed."""
_ALIGN = 16


class HostKV:
    """What was saved of the pool's planes, by key.

    Everything of a key lies in one buffer, page-locked where the pool is on a GPU, so that it is
    copied without the host's help. With `lossy`, rows are kept as int8 and a scale for each row
    and head: |error| <= max |row| / 254.
    """

    def __init__(self, planes: Sequence[Tensor], lossy: bool) -> None:
        """`planes`: [planes of one dim, places, dim] each, written to by `load`."""
        self._planes = planes
        self._lossy = lossy
        self._buffers: dict[int, Tensor] = {}

    @property
    def position_bytes(self) -> int:
        """Of one position in all planes."""
        return sum(
            plane.shape[0] * (plane.shape[2] + 4 if self._lossy else _row_bytes(plane))
            for plane in self._planes
        )

    def save(self, key: int, places: Sequence[int]) -> None:
        """Read places, in their order.

        Raises:
            EngineLost: there is no host memory; their pages may have been given to others already.
        """
        buffer = self._buffer(len(places))
        for plane, at, piece in self._pieces(places, buffer):
            rows = plane.index_select(1, at)
            if self._lossy:
                rounded, scale = KVFormat(torch.int8).quantize(rows)
                scales, values = _split(piece, rows.shape)
                assert scale is not None, "int8 has scales"
                scales.copy_(scale, non_blocking=True)
                values.copy_(rounded, non_blocking=True)
            else:
                piece.view(rows.dtype).view(rows.shape).copy_(rows, non_blocking=True)
        self._buffers[key] = buffer

    def load(self, key: int, places: Sequence[int]) -> None:
        """Write what was saved into as many places; it is gone from here then."""
        buffer = self._buffers.pop(key)
        for plane, at, piece in self._pieces(places, buffer):
            shape = torch.Size((plane.shape[0], len(at), plane.shape[2]))
            if self._lossy:
                scales, values = (
                    part.to(plane.device, non_blocking=True) for part in _split(piece, shape)
                )
                rows = (values * scales).to(plane.dtype)
            else:
                rows = piece.view(plane.dtype).view(shape).to(plane.device, non_blocking=True)
            plane.index_copy_(1, at, rows)

    def forget(self, key: int) -> None:
        """Drop what was saved, if anything."""
        self._buffers.pop(key, None)

    def _pieces(
        self, places: Sequence[int], buffer: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Plane, places, and their bytes of the buffer, chunk by chunk."""
        begin = 0
        for first in range(0, len(places), _CHUNK):
            chunk = places[first : first + _CHUNK]
            for plane in self._planes:
                end = begin + self._piece_bytes(plane, len(chunk))
                at = torch.tensor(chunk, device=plane.device)
                yield plane, at, buffer[begin:end]
                begin = -(-end // _ALIGN) * _ALIGN

    def _piece_bytes(self, plane: Tensor, count: int) -> int:
        row = plane.shape[2] + 4 if self._lossy else _row_bytes(plane)
        return plane.shape[0] * count * row

    def _buffer(self, num_places: int) -> Tensor:
        chunks = [min(_CHUNK, num_places - at) for at in range(0, num_places, _CHUNK)]
        pieces = [self._piece_bytes(plane, count) for count in chunks for plane in self._planes]
        size = sum(-(-piece // _ALIGN) * _ALIGN for piece in pieces)
        pinned = self._planes[0].device.type == "cuda"
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        except RuntimeError as error:
            raise EngineLost(f"no host memory for {size} bytes of swapped KV: {error}") from error


def _row_bytes(plane: Tensor) -> int:
    return plane.shape[2] * plane.element_size()


def _split(piece: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The scales and the values of a lossy piece, as views."""
    scale_bytes = 4 * shape[0] * shape[1]
    scales = piece[:scale_bytes].view(torch.float32).view(shape[0], shape[1], 1)
    return scales, piece[scale_bytes:].view(torch.int8).view(shape)
