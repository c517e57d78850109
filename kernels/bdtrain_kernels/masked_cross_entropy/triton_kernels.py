"""Two passes over a chunk of logits in the model's dtype: read once, then overwritten by their gradients.

All arithmetic is float32 in registers. A program sees one row; any vocabulary size, any row stride, any
number of ids and excluded ids (looped over). Every program writes its own places: no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bdtrain_kernels.compile_cases import CompileCase

SUMMARY_BLOCK = 4096
GRADIENT_BLOCK = 2048
NUM_WARPS = 8

NOTHING = tl.constexpr(-3.4028234663852886e38)
"""Peak of a row without any logit: the smallest float32, since -inf - -inf is no number."""


@triton.jit
def summarise_rows(
    logits,
    ids,
    excluded,
    peaks,
    totals,
    values,
    row_stride,
    first_id,
    columns,
    width,
    num_ids,
    num_excluded,
    block: tl.constexpr,
):
    """Of a row: largest logit, sum of exp(logit - largest), logits of some ids."""
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * row_stride
    peak = NOTHING
    total = tl.zeros((block,), dtype=tl.float32)
    for begin in range(0, columns, block):
        column = begin + tl.arange(0, block)
        # Loads are cut at the padded width, whose multiples of 16 let a thread load 16 bytes at once.
        x = tl.load(row_logits + column, mask=column < width, other=float("-inf")).to(tl.float32)
        x = tl.where(column < columns, x, float("-inf"))
        for e in range(num_excluded):
            x = tl.where(first_id + column == tl.load(excluded + e), float("-inf"), x)
        higher = tl.maximum(peak, tl.max(x, 0))
        total = total * tl.exp(peak - higher) + tl.exp(x - higher)
        peak = higher
    tl.store(peaks + row, peak)
    tl.store(totals + row, tl.sum(total, 0))
    for k in range(num_ids):
        wanted = tl.load(ids + row * num_ids + k)
        index = wanted - first_id
        mine = (index >= 0) & (index < columns)
        value = tl.load(row_logits + index, mask=mine, other=0.0).to(tl.float32)
        for e in range(num_excluded):
            value = tl.where(mine & (wanted == tl.load(excluded + e)), float("-inf"), value)
        tl.store(values + row * num_ids + k, value)


@triton.jit
def write_score_gradients(
    logits,
    ids,
    id_factors,
    excluded,
    shifts,
    factors,
    row_stride,
    first_id,
    columns,
    width,
    num_ids,
    num_excluded,
    block: tl.constexpr,
):
    """Overwrite logits by exp(logit - shift) * factor + the factors of ids; 0 where excluded or padding."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    place = logits + row * row_stride + column
    x = tl.load(place, mask=column < width, other=float("-inf")).to(tl.float32)
    gradient = tl.exp(x - tl.load(shifts + row)) * tl.load(factors + row)
    for k in range(num_ids):
        added = tl.load(id_factors + row * num_ids + k)
        gradient += tl.where(first_id + column == tl.load(ids + row * num_ids + k), added, 0.0)
    for e in range(num_excluded):
        gradient = tl.where(first_id + column == tl.load(excluded + e), 0.0, gradient)
    gradient = tl.where(column < columns, gradient, 0.0)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=column < width)


def compile_cases(shared_kib: int) -> list[CompileCase]:
    """Both kernels for bfloat16 logits, on any device: they use next to no shared memory.

    Args:
        shared_kib: not used.
    """
    integers = {
        name: "i32" for name in ("row_stride", "first_id", "columns", "width", "num_ids", "num_excluded")
    }
    pointers = {"logits": "*bf16", "ids": "*i64", "excluded": "*i64"}
    summary = {name: "*fp32" for name in ("peaks", "totals", "values")}
    gradient = {name: "*fp32" for name in ("id_factors", "shifts", "factors")}
    cases = []
    for kernel, own, block in (
        (summarise_rows, summary, SUMMARY_BLOCK),
        (write_score_gradients, gradient, GRADIENT_BLOCK),
    ):
        types = {name: {**pointers, **integers, **own}[name] for name in kernel.arg_names if name != "block"}
        cases.append(
            CompileCase(
                name=kernel.__name__,
                kernel=kernel,
                types=types,
                constants={"block": block},
                num_warps=NUM_WARPS,
                num_stages=1,
                tensor_cores=False,
                aligned=frozenset({*pointers, *own, "row_stride", "first_id", "width"}),
            )
        )
    return cases
