"""Triton kernels: forward, and backward for queries and for keys, without a mask tensor anywhere.

Every row sees two intervals of keys at most: its own block in its own noisy stream, and the clean tokens of
its document before its block (a clean row: up to the end of its block). Bounds grow with the row, so the
bounds of a tile are those of its first and last row, read from the four vectors of the layout: a change of
block size or documents changes numbers, not code. Tiles that all rows of a program see wholly skip the mask.

Both backward kernels compute the probabilities again from the saved LSE and write every gradient once, so
two runs are equal bit for bit.

Streams lie along the row axis as noisy_1 .. noisy_C, clean. LSE and DELTA are [batch, heads, row streams *
seq], float32, the LSE in powers of 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-1.0e30)
"""Score of a hidden key. Finite: a row whose keys in a tile are all hidden stays finite, and what it gathers
there is multiplied by exactly 0 when it meets a key that it sees."""


@triton.jit
def _load_rows(
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
def _store_rows(base, rows, row_stride, columns, valid, tile, D: tl.constexpr, PAD: tl.constexpr):
    pointers = base + rows[:, None] * row_stride + columns[None, :]
    if D == PAD:
        tl.store(pointers, tile.to(base.dtype.element_ty), mask=valid[:, None])
    else:
        tl.store(pointers, tile.to(base.dtype.element_ty), mask=valid[:, None] & (columns[None, :] < D))


@triton.jit
def _ends(VECTOR, tile_rows, first, last):
    """A vector of the layout at the rows of a tile, and at its first and last row."""
    return tl.load(VECTOR + tile_rows), tl.load(VECTOR + first), tl.load(VECTOR + last)


@triton.jit
def _place_rows(heads, group, row_streams, seq, BLOCK_M: tl.constexpr):
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
def _bounds_of_part(own, block_start, block_end, doc_start, past):
    """Keys [low, high) of one part of a row's keys: its own noisy block, or its clean past."""
    return tl.where(own, block_start, doc_start), tl.where(own, block_end, past)


@triton.jit
def _cut(low_first, low_last, high_first, high_last, TILE: tl.constexpr):
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
    k = _load_rows(k_base + start * k_row.to(tl.int64), keys, k_row, columns, at < seq, MASKED, D, PAD)
    v = _load_rows(v_base + start * v_row.to(tl.int64), keys, v_row, columns, at < seq, MASKED, D, PAD)
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
    batch_head, batch, head, kv_head, stream, r0 = _place_rows(heads, group, row_streams, seq, BLOCK_M)
    is_clean = stream == copies
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, PAD)
    valid = r0 + rows < seq
    stream_row = stream.to(tl.int64) * seq
    q_base = Q + batch * q_batch + head * q_head + (stream_row + r0) * q_row
    q = _load_rows(q_base, rows, q_row, columns, valid, True, D, PAD)
    last = tl.minimum(r0 + BLOCK_M, seq) - 1
    at = batch * layout_batch + tl.minimum(r0 + rows, seq - 1)
    at0 = batch * layout_batch + r0
    at1 = batch * layout_batch + last
    block_start, block_start0, block_start1 = _ends(BLOCK_START, at, at0, at1)
    block_end, block_end0, block_end1 = _ends(BLOCK_END, at, at0, at1)
    doc_start, doc_start0, doc_start1 = _ends(DOC_START, at, at0, at1)
    past = tl.where(is_clean, block_end, block_start)
    past0 = tl.where(is_clean, block_end0, block_start0)
    past1 = tl.where(is_clean, block_end1, block_start1)

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
        own = part == 0
        key_row = tl.where(own, stream, copies).to(tl.int64) * seq
        k_base = k_start + key_row * k_row
        v_base = v_start + key_row * v_row
        low, high = _bounds_of_part(own, block_start, block_end, doc_start, past)
        low0, high0 = _bounds_of_part(own, block_start0, block_end0, doc_start0, past0)
        low1, high1 = _bounds_of_part(own, block_start1, block_end1, doc_start1, past1)
        first, before, whole, whole_end, after = _cut(low0, low1, high0, high1, BLOCK_N)
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
    _store_rows(out_base, rows, out_row, columns, valid, acc * (1.0 / total)[:, None], D, PAD)
    lse = LSE + batch_head * row_streams * seq + stream_row + r0
    tl.store(lse + rows, peak + tl.math.log2(total), mask=valid)


@triton.jit(do_not_specialize=["total_rows", "heads"])
def sum_products(
    OUT,
    GRAD,
    DELTA,
    out_batch,
    out_head,
    out_row,
    grad_batch,
    grad_head,
    grad_row,
    heads,
    total_rows,
    D: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """DELTA = sum over channels of OUT * GRAD, the term that the softmax of a whole row asks for."""
    tiles = tl.cdiv(total_rows, BLOCK_M)
    batch_head = tl.program_id(0) // tiles
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    r0 = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, PAD)
    valid = r0 + rows < total_rows
    out_base = OUT + batch * out_batch + head * out_head + r0 * out_row
    grad_base = GRAD + batch * grad_batch + head * grad_head + r0 * grad_row
    out = _load_rows(out_base, rows, out_row, columns, valid, True, D, PAD).to(tl.float32)
    grad = _load_rows(grad_base, rows, grad_row, columns, valid, True, D, PAD).to(tl.float32)
    tl.store(DELTA + batch_head.to(tl.int64) * total_rows + r0 + rows, tl.sum(out * grad, 1), mask=valid)


@triton.jit
def _grad_of_rows(
    grad_q,
    q,
    grad,
    lse,
    delta,
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
    """Share of one tile of keys in the gradient of the rows' natural scores times k."""
    columns = tl.arange(0, PAD)
    keys = tl.arange(0, BLOCK_N)
    at = start + keys
    k = _load_rows(k_base + start * k_row.to(tl.int64), keys, k_row, columns, at < seq, MASKED, D, PAD)
    v = _load_rows(v_base + start * v_row.to(tl.int64), keys, v_row, columns, at < seq, MASKED, D, PAD)
    weights = tl.math.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale2 - lse[:, None])
    if MASKED:
        seen = (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])
        weights = tl.where(seen, weights, 0.0)
    grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision=PRECISION)


@triton.jit(do_not_specialize=["seq", "heads", "group", "copies", "row_streams"])
def backward_rows(
    Q,
    K,
    V,
    GRAD,
    LSE,
    DELTA,
    GRAD_Q,
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
    grad_batch,
    grad_head,
    grad_row,
    gq_batch,
    gq_head,
    gq_row,
    layout_batch,
    heads,
    group,
    copies,
    row_streams,
    seq,
    scale2,
    scale,
    CLEAN: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of one tile of rows; the same walk over keys as ``forward``."""
    batch_head, batch, head, kv_head, stream, r0 = _place_rows(heads, group, row_streams, seq, BLOCK_M)
    is_clean = stream == copies
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, PAD)
    valid = r0 + rows < seq
    stream_row = stream.to(tl.int64) * seq
    q_base = Q + batch * q_batch + head * q_head + (stream_row + r0) * q_row
    q = _load_rows(q_base, rows, q_row, columns, valid, True, D, PAD)
    grad_base = GRAD + batch * grad_batch + head * grad_head + (stream_row + r0) * grad_row
    grad = _load_rows(grad_base, rows, grad_row, columns, valid, True, D, PAD)
    sums = batch_head * row_streams * seq + stream_row + r0
    lse = tl.load(LSE + sums + rows, mask=valid, other=0.0)
    delta = tl.load(DELTA + sums + rows, mask=valid, other=0.0)
    last = tl.minimum(r0 + BLOCK_M, seq) - 1
    at = batch * layout_batch + tl.minimum(r0 + rows, seq - 1)
    at0 = batch * layout_batch + r0
    at1 = batch * layout_batch + last
    block_start, block_start0, block_start1 = _ends(BLOCK_START, at, at0, at1)
    block_end, block_end0, block_end1 = _ends(BLOCK_END, at, at0, at1)
    doc_start, doc_start0, doc_start1 = _ends(DOC_START, at, at0, at1)
    past = tl.where(is_clean, block_end, block_start)
    past0 = tl.where(is_clean, block_end0, block_start0)
    past1 = tl.where(is_clean, block_end1, block_start1)

    grad_q = tl.zeros((BLOCK_M, PAD), tl.float32)
    k_start = K + batch * k_batch + kv_head * k_head
    v_start = V + batch * v_batch + kv_head * v_head
    first_part = tl.where(is_clean, 1, 0)
    parts = 1
    if CLEAN:
        parts = 2
    for part in range(first_part, parts):
        own = part == 0
        key_row = tl.where(own, stream, copies).to(tl.int64) * seq
        k_base = k_start + key_row * k_row
        v_base = v_start + key_row * v_row
        low, high = _bounds_of_part(own, block_start, block_end, doc_start, past)
        low0, high0 = _bounds_of_part(own, block_start0, block_end0, doc_start0, past0)
        low1, high1 = _bounds_of_part(own, block_start1, block_end1, doc_start1, past1)
        first, before, whole, whole_end, after = _cut(low0, low1, high0, high1, BLOCK_N)
        for i in range(0, before + after):
            start = tl.where(i < before, first + i * BLOCK_N, whole_end + (i - before) * BLOCK_N)
            grad_q = _grad_of_rows(
                grad_q, q, grad, lse, delta, k_base, v_base, k_row, v_row, start, low, high, seq, scale2,
                True, D, PAD, BLOCK_N, PRECISION,
            )  # fmt: skip
        for start in range(whole, whole_end, BLOCK_N):
            grad_q = _grad_of_rows(
                grad_q, q, grad, lse, delta, k_base, v_base, k_row, v_row, start, low, high, seq, scale2,
                False, D, PAD, BLOCK_N, PRECISION,
            )  # fmt: skip
    gq_base = GRAD_Q + batch * gq_batch + head * gq_head + (stream_row + r0) * gq_row
    _store_rows(gq_base, rows, gq_row, columns, valid, grad_q * scale, D, PAD)


@triton.jit
def _grads_of_keys(
    grad_k,
    grad_v,
    k,
    v,
    q_base,
    grad_base,
    lse_base,
    delta_base,
    q_row,
    grad_row,
    start,
    low,
    high,
    seq,
    scale2,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Share of one tile of rows in the gradients of the keys (of natural scores times q) and values."""
    columns = tl.arange(0, PAD)
    rows = tl.arange(0, BLOCK_M)
    at = start + rows
    q = _load_rows(q_base + start * q_row.to(tl.int64), rows, q_row, columns, at < seq, MASKED, D, PAD)
    grad = _load_rows(
        grad_base + start * grad_row.to(tl.int64), rows, grad_row, columns, at < seq, MASKED, D, PAD
    )
    if MASKED:
        lse = tl.load(lse_base + at, mask=at < seq, other=0.0)
        delta = tl.load(delta_base + at, mask=at < seq, other=0.0)
    else:
        lse = tl.load(lse_base + at)
        delta = tl.load(delta_base + at)
    # Keys are the rows of these matrices, so that both gradients are plain products.
    weights = tl.math.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale2 - lse[None, :])
    if MASKED:
        seen = (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])
        weights = tl.where(seen, weights, 0.0)
    grad_v = tl.dot(weights.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
    grad_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta[None, :])
    grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["seq", "heads", "group", "copies", "row_streams"])
def backward_keys(
    Q,
    K,
    V,
    GRAD,
    LSE,
    DELTA,
    GRAD_K,
    GRAD_V,
    BLOCK_START,
    BLOCK_END,
    DOC_END,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    grad_batch,
    grad_head,
    grad_row,
    gk_batch,
    gk_head,
    gk_row,
    gv_batch,
    gv_head,
    gv_row,
    layout_batch,
    heads,
    group,
    copies,
    row_streams,
    seq,
    scale2,
    scale,
    CLEAN_KEYS: tl.constexpr,
    D: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one tile of keys of one stream and key head, over all rows and query heads that see it.

    A clean key is seen by clean rows from its block's start and by noisy rows of every copy from its block's
    end, both up to the end of its document; a noisy key by the rows of its own stream and block. Two
    launches: clean keys, noisy keys (their programs are two orders of magnitude shorter).
    """
    tiles = tl.cdiv(seq, BLOCK_N)
    streams = 1 if CLEAN_KEYS else copies
    place = tl.program_id(0) % (tiles * streams)
    batch_kv = tl.program_id(0) // (tiles * streams)
    kv_heads = heads // group
    tile = place // streams  # the first clean keys are seen by most rows
    stream = copies if CLEAN_KEYS else place % streams
    batch = (batch_kv // kv_heads).to(tl.int64)
    kv_head = (batch_kv % kv_heads).to(tl.int64)
    c0 = tile * BLOCK_N
    keys = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, PAD)
    valid = c0 + keys < seq
    key_row = stream.to(tl.int64) * seq + c0
    k_base = K + batch * k_batch + kv_head * k_head + key_row * k_row
    v_base = V + batch * v_batch + kv_head * v_head + key_row * v_row
    k = _load_rows(k_base, keys, k_row, columns, valid, True, D, PAD)
    v = _load_rows(v_base, keys, v_row, columns, valid, True, D, PAD)
    at = batch * layout_batch + tl.minimum(c0 + keys, seq - 1)
    at0 = batch * layout_batch + c0
    at1 = batch * layout_batch + tl.minimum(c0 + BLOCK_N, seq) - 1
    block_start, block_start0, block_start1 = _ends(BLOCK_START, at, at0, at1)
    block_end, block_end0, block_end1 = _ends(BLOCK_END, at, at0, at1)
    if CLEAN_KEYS:
        high, high0, high1 = _ends(DOC_END, at, at0, at1)
        asking_streams = row_streams
    else:
        high = block_end
        high0 = block_end0
        high1 = block_end1
        asking_streams = 1

    grad_k = tl.zeros((BLOCK_N, PAD), tl.float32)
    grad_v = tl.zeros((BLOCK_N, PAD), tl.float32)
    for turn in range(0, group * asking_streams):
        head = kv_head * group + turn // asking_streams
        if CLEAN_KEYS:
            row_stream = turn % asking_streams
            noisy = row_stream != copies
            low = tl.where(noisy, block_end, block_start)
            low0 = tl.where(noisy, block_end0, block_start0)
            low1 = tl.where(noisy, block_end1, block_start1)
        else:
            row_stream = stream
            low = block_start
            low0 = block_start0
            low1 = block_start1
        stream_row = row_stream.to(tl.int64) * seq
        q_base = Q + batch * q_batch + head * q_head + stream_row * q_row
        grad_base = GRAD + batch * grad_batch + head * grad_head + stream_row * grad_row
        sums = (batch * heads + head) * row_streams * seq + stream_row
        first, before, whole, whole_end, after = _cut(low0, low1, high0, high1, BLOCK_M)
        for i in range(0, before + after):
            start = tl.where(i < before, first + i * BLOCK_M, whole_end + (i - before) * BLOCK_M)
            grad_k, grad_v = _grads_of_keys(
                grad_k, grad_v, k, v, q_base, grad_base, LSE + sums, DELTA + sums, q_row, grad_row, start,
                low, high, seq, scale2, True, D, PAD, BLOCK_M, PRECISION,
            )  # fmt: skip
        for start in range(whole, whole_end, BLOCK_M):
            grad_k, grad_v = _grads_of_keys(
                grad_k, grad_v, k, v, q_base, grad_base, LSE + sums, DELTA + sums, q_row, grad_row, start,
                low, high, seq, scale2, False, D, PAD, BLOCK_M, PRECISION,
            )  # fmt: skip
    gk_base = GRAD_K + batch * gk_batch + kv_head * gk_head + key_row * gk_row
    gv_base = GRAD_V + batch * gv_batch + kv_head * gv_head + key_row * gv_row
    _store_rows(gk_base, keys, gk_row, columns, valid, grad_k * scale, D, PAD)
    _store_rows(gv_base, keys, gv_row, columns, valid, grad_v, D, PAD)
