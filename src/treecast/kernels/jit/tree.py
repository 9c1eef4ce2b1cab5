"""Tree attention for speed: splits of a sequence's pages, then a merge by log-sum-exp."""

import triton
import triton.language as tl

from treecast.kernels.jit.blocks import fold, load_places, load_queries, score


@triton.jit
def attend_items(
    query,
    key_pool,
    value_pool,
    table,
    partial,
    logsums,
    rows_at,
    query_stride_head,
    query_stride_row,
    key_stride_head,
    key_stride_place,
    value_stride_head,
    value_stride_place,
    scaling,
    softcap,
    window,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    PAGE: tl.constexpr,
    ITEM_COLUMNS: tl.constexpr,
    ROW_COLUMNS: tl.constexpr,
):
    """One item's softmax over its pages, for one KV head. Grid: items, KV heads.

    Rows of a tile are its nodes, each with the query heads that share the KV head. Pages that are
    wholly committed need no mask: every row sees them. The others are masked by the rows' bits.
    """
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    first_row = tl.load(table + item * ITEM_COLUMNS)
    num_rows = tl.load(table + item * ITEM_COLUMNS + 1)
    if num_rows == 0:
        return
    header = tl.load(table + item * ITEM_COLUMNS + 2)
    first_page = tl.load(table + item * ITEM_COLUMNS + 3)
    stop_page = tl.load(table + item * ITEM_COLUMNS + 4)
    length = tl.load(table + header)
    num_new = tl.load(table + header + 1)
    pages_at = tl.load(table + header + 2)
    depths_at = tl.load(table + header + 3)

    lanes = tl.arange(0, BLOCK_ROWS)
    live = lanes < num_rows * GROUP
    rows = first_row + lanes // GROUP
    heads = kv_head * GROUP + lanes % GROUP
    queries = load_queries(
        query, rows, heads, live, query_stride_head, query_stride_row, KEY_DIM, BLOCK_KEY
    ).to(key_pool.dtype.element_ty)
    row_facts = table + rows_at + rows * ROW_COLUMNS
    positions = length + tl.load(row_facts + 1, mask=live, other=0)
    bits_at = tl.load(row_facts + 2, mask=live, other=0)
    keys_at = key_pool + kv_head.to(tl.int64) * key_stride_head
    values_at = value_pool + kv_head.to(tl.int64) * value_stride_head

    peak = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
    lanes_of_page = tl.arange(0, PAGE)
    every = lanes_of_page >= 0
    begin = first_page
    if WINDOWED:
        begin = tl.maximum(first_page, (length - window + 1) // PAGE)
    committed = tl.minimum(stop_page, length // PAGE)
    for page in range(begin, committed):
        places = tl.load(table + pages_at + page) * PAGE + lanes_of_page
        keys = load_places(keys_at, places, every, key_stride_place, KEY_DIM, BLOCK_KEY)
        values = load_places(values_at, places, every, value_stride_place, VALUE_DIM, BLOCK_VALUE)
        scores = score(queries, keys, scaling, softcap, CAPPED, False)
        if WINDOWED:
            slots = page * PAGE + lanes_of_page
            near = positions[:, None] - slots[None, :] < window
            scores = tl.where(near, scores, -float("inf"))
        peak, total, sums = fold(peak, total, sums, scores, values, False)

    for page in range(tl.maximum(begin, committed), stop_page):
        slots = page * PAGE + lanes_of_page
        new = slots - length
        known = new < num_new
        places = tl.load(table + pages_at + page) * PAGE + lanes_of_page
        keys = load_places(keys_at, places, known, key_stride_place, KEY_DIM, BLOCK_KEY)
        values = load_places(values_at, places, known, value_stride_place, VALUE_DIM, BLOCK_VALUE)
        drafted = known & (new >= 0)
        bit = tl.maximum(new, 0)
        words = table + bits_at[:, None] + (bit // 32)[None, :]
        word = tl.load(words, mask=live[:, None] & drafted[None, :], other=0)
        visible = (new < 0)[None, :] | (((word >> (bit % 32)[None, :]) & 1) != 0)
        if WINDOWED:
            depths = tl.load(table + depths_at + new, mask=drafted, other=0)
            key_positions = tl.where(new < 0, slots, length + depths)
            visible = visible & (positions[:, None] - key_positions[None, :] < window)
        scores = score(queries, keys, scaling, softcap, CAPPED, False)
        scores = tl.where(visible, scores, -float("inf"))
        peak, total, sums = fold(peak, total, sums, scores, values, False)

    found = total > 0
    mean = sums / tl.where(found, total, 1.0)[:, None]
    at = (item * tl.num_programs(1) + kv_head).to(tl.int64) * BLOCK_ROWS + lanes
    dims = tl.arange(0, BLOCK_VALUE)
    tl.store(
        partial + at[:, None] * VALUE_DIM + dims[None, :],
        mean,
        mask=live[:, None] & (dims < VALUE_DIM)[None, :],
    )
    logsum = tl.where(found, peak + tl.log2(tl.where(found, total, 1.0)), -float("inf"))
    tl.store(logsums + at, logsum, mask=live)


@triton.jit
def merge_items(
    partial,
    logsums,
    table,
    out,
    rows_at,
    out_stride_row,
    out_stride_head,
    kv_heads,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    ROW_COLUMNS: tl.constexpr,
):
    """Weigh the items of a row by their sums of weights. Grid: rows, query heads.

    A row without items (padding) gets zeros.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    facts = table + rows_at + row * ROW_COLUMNS
    first_item = tl.load(facts + 3)
    num_items = tl.load(facts + 4)
    lane = tl.load(facts + 5) * GROUP + head % GROUP
    dims = tl.arange(0, BLOCK_VALUE)
    few = tl.arange(0, BLOCK_ITEMS)
    peak = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([BLOCK_VALUE], tl.float32)
    for begin in range(0, num_items, BLOCK_ITEMS):
        there = begin + few < num_items
        items = (first_item + begin + few).to(tl.int64)
        at = (items * kv_heads + head // GROUP) * BLOCK_ROWS + lane
        logsum = tl.load(logsums + at, mask=there, other=-float("inf"))
        higher = tl.maximum(peak, tl.max(logsum, 0))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(logsum - base)
        shrink = tl.exp2(peak - base)
        means = tl.load(
            partial + at[:, None] * VALUE_DIM + dims[None, :],
            mask=there[:, None] & (dims < VALUE_DIM)[None, :],
            other=0.0,
        )
        total = total * shrink + tl.sum(weights, 0)
        sums = sums * shrink + tl.sum(means * weights[:, None], 0)
        peak = higher
    mean = sums / tl.where(total > 0, total, 1.0)
    at = row * out_stride_row + head * out_stride_head
    tl.store(out + at + dims, mean.to(out.dtype.element_ty), mask=dims < VALUE_DIM)
