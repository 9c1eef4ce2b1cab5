"""Where the weights of layers lie that are not computed with just now."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treecast.engine.quantized import is_bfloat16
from treecast.engine.tensor_files import read_whole
from treecast.errors import ModelError

_BLOCK = 4096
"""Reads that bypass the kernel's cache begin and end at multiples of it."""

_WIDENED_AT_ONCE = 1 << 15
"""Numbers that are turned to float32 at a time: they stay in the core's own cache."""


class LayerStore(Protocol):
    """Weights by layer."""

    def add(self, layer: int, tensors: Sequence[Tensor]) -> int:
        """Keep a copy of a layer's tensors; returns the bytes that loading it moves."""

    def load(self, layer: int, into: Sequence[Tensor]) -> int:
        """Write them into tensors of the same kind; returns the bytes moved. Any one thread's."""

    def close(self) -> None:
        """Give back what is kept."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor's bytes in the file; `halved` where each float32 is kept as the bfloat16 it is."""

    offset: int
    num_bytes: int
    halved: bool


class DiskStore:
    """A scratch file, gone with the process, read past the kernel's cache where that can be.

    The cache would hold weights that the process was told not to, and hide what reading costs.
    """

    def __init__(self, folder: Path, most_bytes_per_s: float | None = None) -> None:
        """Make the file in a folder, which is made too.

        Raises:
            ModelError: the folder cannot be written to.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(prefix="treecast-offload-", dir=folder) as scratch:
                self._writing = os.open(scratch.name, os.O_RDWR)
                self._file = _open_uncached(scratch.name)
        except OSError as error:
            raise ModelError(f"no scratch file can be made in {folder}: {error}") from error
        self._folder = folder
        self._end = 0
        self._layers: dict[int, tuple[int, int, list[_Part]]] = {}
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._most_bytes_per_s = most_bytes_per_s

    def add(self, layer: int, tensors: Sequence[Tensor]) -> int:
        begin, parts = self._end, []
        for tensor in tensors:
            raw = bytes_of(tensor.cpu())
            wide = _is_on_cpu(tensor) and tensor.dtype == torch.float32
            halved = wide and is_bfloat16(torch.from_numpy(raw.view(np.float32)))
            kept = raw.view(np.uint16)[1::2].copy() if halved else raw
            parts.append(_Part(self._end - begin, kept.nbytes, halved))
            self._write(kept.view(np.uint8))
        size = _up(self._end - begin)
        self._end = begin + size
        os.ftruncate(self._writing, self._end)
        self._layers[layer] = begin, size, parts
        if size > len(self._staging):
            self._staging = _page_aligned(size, pinned=not all(map(_is_on_cpu, tensors)))
        os.fdatasync(self._writing)
        os.posix_fadvise(self._writing, begin, size, os.POSIX_FADV_DONTNEED)
        return size

    def load(self, layer: int, into: Sequence[Tensor]) -> int:
        began = time.monotonic()
        begin, size, parts = self._layers[layer]
        read = self._staging[:size]
        read_whole(self._file, read.numpy(), begin)
        os.posix_fadvise(self._file, begin, size, os.POSIX_FADV_DONTNEED)
        for part, tensor in zip(parts, into, strict=True):
            _put(read[part.offset : part.offset + part.num_bytes], part.halved, tensor)
        if not all(map(_is_on_cpu, into)):
            torch.cuda.current_stream().synchronize()  # what was read is overwritten by the next
        if self._most_bytes_per_s is not None:
            time.sleep(max(0.0, began + size / self._most_bytes_per_s - time.monotonic()))
        return size

    def close(self) -> None:
        os.close(self._file)
        os.close(self._writing)

    def _write(self, data: NDArray[np.uint8]) -> None:
        """Behind the last, at a multiple of 64 bytes."""
        try:
            while len(data):
                done = os.pwrite(self._writing, data.data, self._end)
                self._end, data = self._end + done, data[done:]
        except OSError as error:
            raise ModelError(
                f"{self._folder} has no room for a model's layers: {error.strerror} after "
                f"{self._end} bytes"
            ) from error
        self._end = -(-self._end // 64) * 64


class PinnedStore:
    """Memory of the host that a GPU copies from by itself. Unproved on a device."""

    def __init__(self) -> None:
        self._layers: dict[int, list[Tensor]] = {}

    def add(self, layer: int, tensors: Sequence[Tensor]) -> int:
        self._layers[layer] = [tensor.cpu().pin_memory() for tensor in tensors]
        return sum(tensor.nbytes for tensor in tensors)

    def load(self, layer: int, into: Sequence[Tensor]) -> int:
        for kept, target in zip(self._layers[layer], into, strict=True):
            target.copy_(kept, non_blocking=True)
        return sum(kept.nbytes for kept in self._layers[layer])

    def close(self) -> None:
        self._layers.clear()


def bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """A CPU tensor's memory, which is not copied; packed ones have memory but no storage."""
    if tensor.is_mkldnn:
        address, size = _OPS.data_ptr(tensor), _OPS._nbytes(tensor)
    else:
        if not tensor.is_contiguous():
            raise ModelError(f"a weight of shape {tuple(tensor.shape)} does not lie in one piece")
        address, size = tensor.data_ptr(), tensor.nbytes
    if not size:
        return np.empty(0, dtype=np.uint8)
    memory = (ctypes.c_uint8 * size).from_address(address)
    return np.ctypeslib.as_array(memory)


def layout_of(tensor: Tensor) -> bytes:
    """Equal for tensors of a shape and type whose numbers lie in the same order."""
    if tensor.is_mkldnn:
        return bytes(_OPS._get_mkldnn_serialized_md(tensor).numpy())
    return repr(tensor.stride()).encode()


def _put(kept: Tensor, halved: bool, target: Tensor) -> None:
    if not _is_on_cpu(target):
        target.copy_(kept.view(target.dtype).view(target.shape), non_blocking=True)
    elif halved:
        _widen(kept.numpy().view(np.uint16), bytes_of(target).view(np.uint32))
    else:
        bytes_of(target)[:] = kept.numpy()


def _is_on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _page_aligned(size: int, pinned: bool) -> Tensor:
    if pinned:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def _widen(short: NDArray[np.uint16], wide: NDArray[np.uint32]) -> None:
    for at in range(0, len(short), _WIDENED_AT_ONCE):
        part = wide[at : at + _WIDENED_AT_ONCE]
        part[:] = short[at : at + _WIDENED_AT_ONCE]
        part <<= 16


def _open_uncached(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # some file systems, such as tmpfs of older kernels, have no such reads
        return os.open(path, os.O_RDONLY)


def _up(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


# Operators of torch that have no typed Python front.
_OPS: Any = torch.ops.mkldnn
