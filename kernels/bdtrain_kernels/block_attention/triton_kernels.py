"""Triton kernel of the forward pass, without a mask tensor anywhere, and what it shares with backward.

Every row sees two intervals of keys at most: its own block in its own noisy stream, and the clean tokens of
its document before its block (a clean row: up to the end of its block). Bounds grow with the row, so the
bounds of a tile are those of its first and last row, read from the four vectors of the layout: a change of
block size or documents changes numbers, not code. Tiles that all rows of a program see wholly skip the mask.

Streams lie along the row axis as noisy_1 .. noisy_C, clean. LSE is [batch, heads, row streams * seq],
float32, in powers of 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1.0e30)
"""Score of a hidden key. Finite: a row whose keys in a tile are all hidden stays finite, and what it gathers
there is multiplied by exactly 0 when it meets a key that it sees."""


@triton.jit
def load_rows(
    base, rows, row_stride, columns, valid, GUARD: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr
):
    """[rows, PAD]; with GUARD rows that are not valid are 0; columns from D on always are."""
    pointers = base + rows[:, None] * row_stride + columns[None, :]
    if GUARD:
        if D == PAD:
            tile = tl.load(pointers, mask=valid[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=valid[:, None] & (columns[None, :] < D), other=0.0)
    else:
        if D == PAD:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=columns[None, :] < D, other=0.0)
    return tile


@triton.jit
def store_rows(base, rows, row_stride, columns, valid, tile, D: tl.constexpr, PAD: tl.constexpr):
    """Write the valid rows and the columns below D, rounded to what ``base`` points to."""
    pointers = base + rows[:, None] * row_stride + columns[None, :]
    if D == PAD:
        tl.store(pointers, tile.to(base.dtype.element_ty), mask=valid[:, None])
    else:
        tl.store(pointers, tile.to(base.dtype.element_ty), mask=valid[:, None] & (columns[None, :] < D))


@triton.jit
def ends(VECTOR, tile_rows, first, last):
    """A vector of the layout at the rows of a tile, and at its first and last row."""
    return tl.load(VECTOR + tile_rows), tl.load(VECTOR + first), tl.load(VECTOR + last)


@triton.jit
def place_rows(heads, group, row_streams, seq, BLOCK_M: tl.constexpr):
    """Which rows this program has: (batch * heads + head, batch, head, key head, stream, first row).

    The longest tiles come first, and the streams of a tile follow each other: they read the same clean keys.
    """
    tiles = tl.cdiv(seq, BLOCK_M)
    place = tl.program_id(0) % (tiles * row_streams)
    batch_head = (tl.program_id(0) // (tiles * row_streams)).to(tl.int64)
    head = batch_head % heads
    tile = tiles - 1 - place // row_streams
    return batch_head, batch_head // heads, head, head // group, place % row_streams, tile * BLOCK_M


@triton.jit
def cut(low_first, low_last, high_first, high_last, TILE: tl.constexpr):
    """How an interval [low, high) with bounds that grow over a tile of rows falls into tiles of keys.

    Returns the first tile, the number of masked tiles before the whole ones, the start and the end of the
    whole ones (which all rows see wholly), and the number of masked tiles after them.
    """
    first = low_first // TILE * TILE
    whole = tl.cdiv(low_last, TILE) * TILE
    whole_end = tl.maximum(high_first // TILE * TILE, whole)
    before = tl.cdiv(tl.maximum(tl.minimum(whole, high_last) - first, 0), TILE)
    after = tl.cdiv(tl.maximum(high_last - whole_end, 0), TILE)
    return first, before, whole, whole_end, after


@triton.jit
def keys_of_part(
    part,
    is_clean,
    BLOCK_START,
    BLOCK_END,
    DOC_START,
    layout_row,
    r0,
    seq,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys of one part of a tile of rows, and how they fall into tiles of keys (``cut``).

    Part 0 is the own block in the own noisy stream, [block_start, block_end); part 1 the clean past,
    [doc_start, block_start) for a noisy row and [doc_start, block_end) for a clean one.
    """
    at = layout_row + tl.minimum(r0 + tl.arange(0, BLOCK_M), seq - 1)
    at0 = layout_row + r0
    at1 = layout_row + tl.minimum(r0 + BLOCK_M, seq) - 1
    block_start, block_start0, block_start1 = ends(BLOCK_START, at, at0, at1)
    block_end, block_end0, block_end1 = ends(BLOCK_END, at, at0, at1)
    doc_start, doc_start0, doc_start1 = ends(DOC_START, at, at0, at1)
    own = part == 0
    to_end = own | is_clean
    low = tl.where(own, block_start, doc_start)
    high = tl.where(to_end, block_end, block_start)
    first, before, whole, whole_end, after = cut(
        tl.where(own, block_start0, doc_start0),
        tl.where(own, block_start1, doc_start1),
        tl.where(to_end, block_end0, block_start0),
        tl.where(to_end, block_end1, block_start1),
        BLOCK_N,
    )
    return low, high, first, before, whole, whole_end, after


@triton.jit
def _attend(
    acc,
    total,
    peak,
    q,
    k_base,
    v_base,
    k_row,
    v_row,
    start,
    low,
    high,
    seq,
    scale2,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys into the running output, sum and maximum of the rows."""
    columns = tl.arange(0, PAD)
    keys = tl.arange(0, BLOCK_N)
    at = start + keys
    k = load_rows(k_base + start * k_row.to(tl.int64), keys, k_row, columns, at < seq, MASKED, D, PAD)
    v = load_rows(v_base + start * v_row.to(tl.int64), keys, v_row, columns, at < seq, MASKED, D, PAD)
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        seen = (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])
        products = tl.where(seen, products, HIDDEN)
    # The scale is positive: applied after the maximum it costs one fused operation per score, not two.
    new_peak = tl.maximum(peak, tl.max(products, 1) * scale2)
    weights = tl.math.exp2(products * scale2 - new_peak[:, None])
    fade = tl.math.exp2(peak - new_peak)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, total, new_peak


@triton.jit(do_not_specialize=["seq", "heads", "group", "copies", "row_streams"])
def forward(
    Q,
    K,
    V,
    OUT,
    LSE,
    BLOCK_START,
    BLOCK_END,
    DOC_START,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_batch,
    out_head,
    out_row,
    layout_batch,
    heads,
    group,
    copies,
    row_streams,
    seq,
    scale2,
    CLEAN: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one tile of rows of one stream and head."""
    batch_head, batch, head, kv_head, stream, r0 = place_rows(heads, group, row_streams, seq, BLOCK_M)
    is_clean = stream == copies
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, PAD)
    valid = r0 + rows < seq
    stream_row = stream.to(tl.int64) * seq
    q_base = Q + batch * q_batch + head * q_head + (stream_row + r0) * q_row
    q = load_rows(q_base, rows, q_row, columns, valid, True, D, PAD)
    layout_row = batch * layout_batch

    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, PAD), tl.float32)
    k_start = K + batch * k_batch + kv_head * k_head
    v_start = V + batch * v_batch + kv_head * v_head
    # Part 0: the own block in the own noisy stream (it comes first: after it every row has met a key that it
    # sees). Part 1: the clean past.
    first_part = tl.where(is_clean, 1, 0)
    parts = 1
    if CLEAN:
        parts = 2
    for part in range(first_part, parts):
        key_row = tl.where(part == 0, stream, copies).to(tl.int64) * seq
        k_base = k_start + key_row * k_row
        v_base = v_start + key_row * v_row
        low, high, first, before, whole, whole_end, after = keys_of_part(
            part, is_clean, BLOCK_START, BLOCK_END, DOC_START, layout_row, r0, seq, BLOCK_M, BLOCK_N
        )
        for i in range(0, before + after):
            start = tl.where(i < before, first + i * BLOCK_N, whole_end + (i - before) * BLOCK_N)
            acc, total, peak = _attend(
                acc, total, peak, q, k_base, v_base, k_row, v_row, start, low, high, seq, scale2,
                True, D, PAD, BLOCK_N, PRECISION,
            )  # fmt: skip
        for start in range(whole, whole_end, BLOCK_N):
            acc, total, peak = _attend(
                acc, total, peak, q, k_base, v_base, k_row, v_row, start, low, high, seq, scale2,
                False, D, PAD, BLOCK_N, PRECISION,
            )  # fmt: skip
    out_base = OUT + batch * out_batch + head * out_head + (stream_row + r0) * out_row
    # One division a row, not one a number.
    store_rows(out_base, rows, out_row, columns, valid, acc * (1.0 / total)[:, None], D, PAD)
    lse = LSE + batch_head * row_streams * seq + stream_row + r0
    tl.store(lse + rows, peak + tl.math.log2(total), mask=valid)
