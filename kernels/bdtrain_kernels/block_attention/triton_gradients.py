"""Triton kernels of the backward pass: for rows (queries), and for keys and values.

Both compute the probabilities again from the saved LSE and write every gradient once, so two runs are equal
bit for bit. LSE and DELTA are [batch, heads, row streams * seq], float32, the LSE in powers of 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bdtrain_kernels.block_attention.triton_kernels import (
    cut,
    ends,
    keys_of_part,
    load_rows,
    place_rows,
    store_rows,
)


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
    out = load_rows(out_base, rows, out_row, columns, valid, True, D, PAD).to(tl.float32)
    grad = load_rows(grad_base, rows, grad_row, columns, valid, True, D, PAD).to(tl.float32)
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
    k = load_rows(k_base + start * k_row.to(tl.int64), keys, k_row, columns, at < seq, MASKED, D, PAD)
    v = load_rows(v_base + start * v_row.to(tl.int64), keys, v_row, columns, at < seq, MASKED, D, PAD)
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
    batch_head, batch, head, kv_head, stream, r0 = place_rows(heads, group, row_streams, seq, BLOCK_M)
    is_clean = stream == copies
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, PAD)
    valid = r0 + rows < seq
    stream_row = stream.to(tl.int64) * seq
    q_base = Q + batch * q_batch + head * q_head + (stream_row + r0) * q_row
    q = load_rows(q_base, rows, q_row, columns, valid, True, D, PAD)
    grad_base = GRAD + batch * grad_batch + head * grad_head + (stream_row + r0) * grad_row
    grad = load_rows(grad_base, rows, grad_row, columns, valid, True, D, PAD)
    sums = batch_head * row_streams * seq + stream_row + r0
    lse = tl.load(LSE + sums + rows, mask=valid, other=0.0)
    delta = tl.load(DELTA + sums + rows, mask=valid, other=0.0)
    layout_row = batch * layout_batch

    grad_q = tl.zeros((BLOCK_M, PAD), tl.float32)
    k_start = K + batch * k_batch + kv_head * k_head
    v_start = V + batch * v_batch + kv_head * v_head
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
    store_rows(gq_base, rows, gq_row, columns, valid, grad_q * scale, D, PAD)


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
    q = load_rows(q_base + start * q_row.to(tl.int64), rows, q_row, columns, at < seq, MASKED, D, PAD)
    grad = load_rows(
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
    k = load_rows(k_base, keys, k_row, columns, valid, True, D, PAD)
    v = load_rows(v_base, keys, v_row, columns, valid, True, D, PAD)
    at = batch * layout_batch + tl.minimum(c0 + keys, seq - 1)
    at0 = batch * layout_batch + c0
    at1 = batch * layout_batch + tl.minimum(c0 + BLOCK_N, seq) - 1
    block_start, block_start0, block_start1 = ends(BLOCK_START, at, at0, at1)
    block_end, block_end0, block_end1 = ends(BLOCK_END, at, at0, at1)
    if CLEAN_KEYS:
        high, high0, high1 = ends(DOC_END, at, at0, at1)
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
        first, before, whole, whole_end, after = cut(low0, low1, high0, high1, BLOCK_M)
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
    store_rows(gk_base, keys, gk_row, columns, valid, grad_k * scale, D, PAD)
    store_rows(gv_base, keys, gv_row, columns, valid, grad_v, D, PAD)
