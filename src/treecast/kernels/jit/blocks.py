"""What the attention kernels have in common: a block of keys folded into a row's running sums."""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
"""Read when triton reads it: as the kernels are defined."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def multiply(a, b, EXACT: tl.constexpr):
    """Matrix product in float32.

    A device's matrix units compute each element alike wherever it lies. The interpreter's library
    does not, so where that is asked for its elements are added up one by one; and it would multiply
    the bit patterns of bfloat16.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        if EXACT:
            return tl.sum(a[:, :, None] * b[None, :, :], 1)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def load_queries(query, rows, heads, live, stride_head, stride_row, DIM, BLOCK_DIM):
    """[len(rows), BLOCK_DIM] of query[head, row], zeros where dead or beyond DIM."""
    dims = tl.arange(0, BLOCK_DIM)
    at = heads[:, None] * stride_head + rows[:, None] * stride_row + dims[None, :]
    return tl.load(query + at, mask=live[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def load_places(pool, places, known, stride_place, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """[len(places), BLOCK_DIM] of one head's pool, zeros where unknown or beyond DIM."""
    dims = tl.arange(0, BLOCK_DIM)
    at = places.to(tl.int64)[:, None] * stride_place + dims[None, :]
    if DIM == BLOCK_DIM:
        return tl.load(pool + at, mask=known[:, None], other=0.0)
    return tl.load(pool + at, mask=known[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def score(queries, keys, scaling, softcap, CAPPED: tl.constexpr, EXACT: tl.constexpr):
    """[queries, keys] scores, times log2(e): weights are powers of two."""
    products = multiply(queries, tl.trans(keys), EXACT) * scaling
    if CAPPED:
        # tanh, by the exponential of a number that is never positive
        shrunk = tl.exp(-2.0 * tl.abs(products) / softcap)
        bent = (1.0 - shrunk) / (1.0 + shrunk) * softcap
        products = tl.where(products < 0, -bent, bent)
    return products * LOG2E


@triton.jit
def fold(peak, total, sums, scores, values, EXACT: tl.constexpr):
    """Running maximum, sum of weights and weighted sum of values, with one more block of keys."""
    higher = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(weights, 1)
    added = multiply(weights.to(values.dtype), values, EXACT)
    return higher, total, sums * shrink[:, None] + added


@triton.jit
def write_rows(
    key,
    value,
    key_pool,
    value_pool,
    table,
    rows_at,
    key_stride_head,
    key_stride_row,
    value_stride_head,
    value_stride_row,
    key_pool_stride_head,
    key_pool_stride_place,
    value_pool_stride_head,
    value_pool_stride_place,
    ROW_COLUMNS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    """Put a pass's new keys and values in their places. Grid: rows, KV heads."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    place = tl.load(table + rows_at + row * ROW_COLUMNS).to(tl.int64)
    if place >= 0:
        dims = tl.arange(0, BLOCK_KEY)
        new = tl.load(
            key + head * key_stride_head + row * key_stride_row + dims, mask=dims < KEY_DIM
        )
        to = key_pool + head * key_pool_stride_head + place * key_pool_stride_place
        tl.store(to + dims, new.to(key_pool.dtype.element_ty), mask=dims < KEY_DIM)
        dims = tl.arange(0, BLOCK_VALUE)
        new = tl.load(
            value + head * value_stride_head + row * value_stride_row + dims, mask=dims < VALUE_DIM
        )
        to = value_pool + head * value_pool_stride_head + place * value_pool_stride_place
        tl.store(to + dims, new.to(value_pool.dtype.element_ty), mask=dims < VALUE_DIM)
