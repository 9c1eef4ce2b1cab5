"""Exact tree attention: a row's bits are a function of its own path alone.

By definition a row goes through its path in order of position, 64 keys at a time. Every 512
positions (a chunk) it begins new running sums; at the end the chunks are merged in order. Both
kernels fold blocks of one shape with one code, whatever the pass looks like, so it does not matter
which of them folds a block, nor beside which rows.
"""

import triton
import triton.language as tl

from treecast.kernels.jit.blocks import fold, load_places, load_queries, score


@triton.jit
def fold_chunks(
    query,
    key_pool,
    value_pool,
    table,
    chunk_sums,
    chunk_peaks,
    chunk_totals,
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
    """A tile's running sums over the whole committed pages of one chunk. Grid: items, KV heads."""
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
    pages_at = tl.load(table + header + 2)

    lanes = tl.arange(0, BLOCK_ROWS)
    live = lanes < num_rows * GROUP
    rows = first_row + lanes // GROUP
    heads = kv_head * GROUP + lanes % GROUP
    queries = load_queries(
        query, rows, heads, live, query_stride_head, query_stride_row, KEY_DIM, BLOCK_KEY
    ).to(key_pool.dtype.element_ty)
    positions = length + tl.load(table + rows_at + rows * ROW_COLUMNS + 1, mask=live, other=0)
    keys_at = key_pool + kv_head.to(tl.int64) * key_stride_head
    values_at = value_pool + kv_head.to(tl.int64) * value_stride_head

    peak = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
    lanes_of_page = tl.arange(0, PAGE)
    for page in range(first_page, stop_page):
        places = tl.load(table + pages_at + page) * PAGE + lanes_of_page
        slots = page * PAGE + lanes_of_page
        peak, total, sums = fold_visible(
            peak,
            total,
            sums,
            queries,
            positions,
            places,
            slots,
            keys_at,
            values_at,
            key_stride_place,
            value_stride_place,
            scaling,
            softcap,
            window,
            CAPPED,
            WINDOWED,
            KEY_DIM,
            VALUE_DIM,
            BLOCK_KEY,
            BLOCK_VALUE,
        )

    at = (item * tl.num_programs(1) + kv_head).to(tl.int64) * BLOCK_ROWS + lanes
    dims = tl.arange(0, BLOCK_VALUE)
    held = live[:, None] & (dims < VALUE_DIM)[None, :]
    tl.store(chunk_sums + at[:, None] * VALUE_DIM + dims[None, :], sums, mask=held)
    tl.store(chunk_peaks + at, peak, mask=live)
    tl.store(chunk_totals + at, total, mask=live)


@triton.jit
def fold_visible(
    peak,
    total,
    sums,
    queries,
    positions,
    places,
    key_positions,
    keys_at,
    values_at,
    key_stride_place,
    value_stride_place,
    scaling,
    softcap,
    window,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_KEY: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    """Fold one logical block: 64 keys by position, those up to a row's own position count."""
    last = tl.max(positions, 0)
    known = key_positions <= last
    keys = load_places(keys_at, places, known, key_stride_place, KEY_DIM, BLOCK_KEY)
    values = load_places(values_at, places, known, value_stride_place, VALUE_DIM, BLOCK_VALUE)
    behind = positions[:, None] - key_positions[None, :]
    visible = behind >= 0
    if WINDOWED:
        visible = visible & (behind < window)
    scores = score(queries, keys, scaling, softcap, CAPPED, True)
    scores = tl.where(visible, scores, -float("inf"))
    return fold(peak, total, sums, scores, values, True)


@triton.jit
def finish_rows(
    query,
    key_pool,
    value_pool,
    table,
    chunk_sums,
    chunk_peaks,
    chunk_totals,
    out,
    rows_at,
    query_stride_head,
    query_stride_row,
    key_stride_head,
    key_stride_place,
    value_stride_head,
    value_stride_place,
    out_stride_row,
    out_stride_head,
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
    CHUNK_PAGES: tl.constexpr,
    ROW_COLUMNS: tl.constexpr,
):
    """Merge a row's chunks in order, and fold the end of its path. Grid: rows, KV heads.

    A row without a place (padding) gets zeros.
    """
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    facts = table + rows_at + row * ROW_COLUMNS
    place = tl.load(facts)
    depth = tl.load(facts + 1)
    path_at = tl.load(facts + 2)
    first_item = tl.load(facts + 3)
    num_items = tl.load(facts + 4)
    row_in_tile = tl.load(facts + 5)
    header = tl.load(facts + 6)
    lanes = tl.arange(0, BLOCK_ROWS)
    live = lanes < GROUP
    dims = tl.arange(0, BLOCK_VALUE)
    held = live[:, None] & (dims < VALUE_DIM)[None, :]
    out_at = row * out_stride_row + (kv_head * GROUP + lanes) * out_stride_head
    out_at = out + out_at[:, None] + dims[None, :]
    if place < 0:
        nothing = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], out.dtype.element_ty)
        tl.store(out_at, nothing, mask=held)
        return

    length = tl.load(table + header)
    last = length + depth
    whole = length // PAGE
    rows = row + lanes * 0
    queries = load_queries(
        query,
        rows,
        kv_head * GROUP + lanes,
        live,
        query_stride_head,
        query_stride_row,
        KEY_DIM,
        BLOCK_KEY,
    ).to(key_pool.dtype.element_ty)
    positions = last + lanes * 0
    keys_at = key_pool + kv_head.to(tl.int64) * key_stride_head
    values_at = value_pool + kv_head.to(tl.int64) * value_stride_head

    # Of all chunks that are complete, in order; then of the chunk at hand.
    all_peak = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    all_total = tl.zeros([BLOCK_ROWS], tl.float32)
    all_sums = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
    peak = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
    for chunk in range(num_items):
        all_peak, all_total, all_sums = merge(all_peak, all_total, all_sums, peak, total, sums)
        at = ((first_item + chunk) * tl.num_programs(1) + kv_head).to(tl.int64) * BLOCK_ROWS
        at += row_in_tile * GROUP + lanes
        peak = tl.load(chunk_peaks + at, mask=live, other=-float("inf"))
        total = tl.load(chunk_totals + at, mask=live, other=0.0)
        sums = tl.load(chunk_sums + at[:, None] * VALUE_DIM + dims[None, :], mask=held, other=0.0)
    lanes_of_page = tl.arange(0, PAGE)
    for page in range(whole, last // PAGE + 1):
        if page % CHUNK_PAGES == 0:
            all_peak, all_total, all_sums = merge(all_peak, all_total, all_sums, peak, total, sums)
            peak = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
            total = tl.zeros([BLOCK_ROWS], tl.float32)
            sums = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
        key_positions = page * PAGE + lanes_of_page
        there = key_positions <= last
        places = tl.load(table + path_at + key_positions - whole * PAGE, mask=there, other=0)
        peak, total, sums = fold_visible(
            peak,
            total,
            sums,
            queries,
            positions,
            places,
            key_positions,
            keys_at,
            values_at,
            key_stride_place,
            value_stride_place,
            scaling,
            softcap,
            window,
            CAPPED,
            WINDOWED,
            KEY_DIM,
            VALUE_DIM,
            BLOCK_KEY,
            BLOCK_VALUE,
        )
    all_peak, all_total, all_sums = merge(all_peak, all_total, all_sums, peak, total, sums)
    tl.store(out_at, (all_sums / all_total[:, None]).to(out.dtype.element_ty), mask=held)


@triton.jit
def merge(all_peak, all_total, all_sums, peak, total, sums):
    """Take one more chunk's sums in; an empty one changes no bit."""
    higher = tl.maximum(all_peak, peak)
    base = tl.where(higher == -float("inf"), 0.0, higher)
    shrink = tl.exp2(all_peak - base)
    weight = tl.exp2(peak - base)
    return (
        higher,
        all_total * shrink + total * weight,
        all_sums * shrink[:, None] + sums * weight[:, None],
    )
