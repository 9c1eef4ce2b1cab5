"""Row-wise layers in a fixed configuration: a row's bits do not depend on its neighbours."""

import triton
import triton.language as tl

from treecast.kernels.jit.blocks import multiply


@triton.jit
def fixed_linear(
    x,
    weight,
    bias,
    y,
    num_rows,
    x_stride,
    weight_stride,
    y_stride,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Y = x weight^T + bias, one tile of outputs. Grid: tiles of outputs, tiles of rows.

    The inner dimension is gone through in order, by blocks, by one program.
    """
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inner = tl.arange(0, BLOCK_IN)
    x_at = x + rows.to(tl.int64)[:, None] * x_stride + inner[None, :]
    weight_at = weight + outs.to(tl.int64)[:, None] * weight_stride + inner[None, :]
    sums = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    for begin in range(0, IN, BLOCK_IN):
        left = begin + inner < IN
        part = tl.load(x_at + begin, mask=(rows < num_rows)[:, None] & left[None, :], other=0.0)
        weights = tl.load(weight_at + begin, mask=(outs < OUT)[:, None] & left[None, :], other=0.0)
        sums += multiply(part, tl.trans(weights), True)
    if BIASED:
        sums += tl.load(bias + outs, mask=outs < OUT, other=0.0).to(tl.float32)[None, :]
    y_at = y + rows.to(tl.int64)[:, None] * y_stride + outs[None, :]
    there = (rows < num_rows)[:, None] & (outs < OUT)[None, :]
    tl.store(y_at, sums.to(y.dtype.element_ty), mask=there)


@triton.jit
def fixed_rms_norm(x, weight, y, x_stride, y_stride, eps, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Y = x / sqrt(mean(x^2) + eps) * weight, in float32. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    values = tl.load(x + row * x_stride + dims, mask=dims < DIM, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / DIM + eps)
    weights = tl.load(weight + dims, mask=dims < DIM, other=0.0).to(tl.float32)
    normed = values * scale * weights
    tl.store(y + row * y_stride + dims, normed.to(y.dtype.element_ty), mask=dims < DIM)
