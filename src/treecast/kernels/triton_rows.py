"""Linear layers and norms whose row bits do not depend on the number of rows (Triton)."""

from __future__ import annotations

import torch
from torch import Tensor

from treecast.kernels.jit import rows
from treecast.kernels.triton_fast import next_power_of_2

_BLOCK_ROWS = 64
_BLOCK_IN = 64
_WIDE, _NARROW = 64, 32
_NARROW_BELOW = 8192
"""Outputs below which narrower tiles are needed to give every multiprocessor one."""


def fixed_linear(
    x: Tensor,  # [rows, in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
) -> Tensor:  # [rows, out]
    """X weight^T + bias. Tiles depend on the weight's shape alone."""
    assert x.stride(-1) == 1
    assert weight.stride(-1) == 1
    num_out, num_in = weight.shape
    block_out = _NARROW if num_out < _NARROW_BELOW else _WIDE
    y = x.new_empty((len(x), num_out))
    grid = (-(-num_out // block_out), -(-len(x) // _BLOCK_ROWS))
    if len(x):
        rows.fixed_linear[grid](
            x,
            weight,
            weight if bias is None else bias,
            y,
            len(x),
            x.stride(0),
            weight.stride(0),
            y.stride(0),
            IN=num_in,
            OUT=num_out,
            BIASED=bias is not None,
            BLOCK_ROWS=_BLOCK_ROWS,
            BLOCK_IN=_BLOCK_IN,
            BLOCK_OUT=block_out,
            num_warps=4,
            num_stages=4,
        )
    return y


def fixed_rms_norm(
    x: Tensor,  # [rows, dim]
    weight: Tensor,  # [dim]
    eps: float,
) -> Tensor:
    """X / sqrt(mean(x^2) + eps) * weight, each row by itself."""
    assert x.stride(-1) == 1
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if len(x):
        rows.fixed_rms_norm[(len(x),)](
            x,
            weight,
            y,
            x.stride(0),
            y.stride(0),
            eps,
            DIM=x.shape[-1],
            BLOCK=next_power_of_2(x.shape[-1]),
            num_warps=8,
        )
    return y
