"""Tensors of a model folder's safetensors, read one by one.

Read rather than mapped: what is mapped counts as this process's memory for as long as the kernel
likes, and what has become memory of ours need not stay in the kernel's cache as well.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from treecast.errors import ModelError
from treecast.model_folder import StoredTensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_tensor(stored: StoredTensor) -> Tensor:
    """A tensor in memory of its own, in the type that it is stored in. Blocks.

    Raises:
        ModelError: a type that torch lacks, or the file has been cut since.
    """
    if stored.dtype not in _DTYPES:
        raise ModelError(f"{stored.file}: {stored.name} is of type {stored.dtype}, not supported")
    tensor = torch.empty(stored.shape, dtype=_DTYPES[stored.dtype])
    if stored.num_bytes:
        _fill(tensor.view(-1).view(torch.uint8).numpy(), stored)
    return tensor


def _fill(target: NDArray[np.uint8], stored: StoredTensor) -> None:
    file = os.open(stored.file, os.O_RDONLY)
    try:
        read_whole(file, target, stored.offset)
        os.posix_fadvise(file, stored.offset, stored.num_bytes, os.POSIX_FADV_DONTNEED)
    except EOFError as error:
        raise ModelError(f"{stored.file} ends within {stored.name}") from error
    finally:
        os.close(file)


def read_whole(file: int, target: NDArray[np.uint8], offset: int) -> None:
    """Fill memory from a file.

    Raises:
        EOFError: the file ends before.
    """
    done = 0
    while done < len(target):
        count = os.preadv(file, [target[done:].data], offset + done)
        if not count:
            raise EOFError(f"the file ends {len(target) - done} bytes too early")
        done += count
