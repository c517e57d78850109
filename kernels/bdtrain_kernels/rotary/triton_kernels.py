"""Norm and rotation in Triton: a program takes some positions of one row of the batch and loops over heads.

The table is thus read once for several heads. Everything is float32 between loading and storing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bdtrain_kernels.compile_cases import CompileCase

NUMBERS = 1024
"""Numbers of half a tile: 8 for each of the 128 threads, one 16-byte load of a 16-bit type."""

TILE_HEADS = 4
"""Heads of a program."""

NUM_WARPS = 4


@triton.jit
def _load(pointer, step, ok):
    return tl.load(pointer + step, mask=ok, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["seq", "heads", "group_heads"])
def rotate_forward(
    x,
    weight,
    cos,
    sin,
    out,
    seq,
    heads,
    group_heads,
    eps,
    x_seq,
    x_batch,
    x_group,
    x_head,
    table_seq,
    table_batch,
    out_batch,
    out_head,
    normed: tl.constexpr,
    half: tl.constexpr,
    block_half: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_heads: tl.constexpr,
):
    """Out lies as [batch, heads, seq, 2 * half]."""
    rows = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    batch = tl.program_id(1).to(tl.int64)
    first_head = tl.program_id(2).to(tl.int64) * tile_heads
    columns = tl.arange(0, block_half)
    ok = (rows < seq)[:, None] & (columns < half)[None, :]
    at = rows.to(tl.int64)[:, None]
    angle = at * table_seq + batch * table_batch + columns[None, :]
    c, s = _load(cos, angle, ok), _load(sin, angle, ok)
    if normed:
        w1 = _load(weight, columns, columns < half)[None, :]
        w2 = _load(weight, half + columns, columns < half)[None, :]
    for head in range(first_head, tl.minimum(first_head + tile_heads, heads)):
        base = x + batch * x_batch + (head // group_heads) * x_group + (head % group_heads) * x_head
        step = at * x_seq + columns[None, :]
        x1, x2 = _load(base, step, ok), _load(base, half + step, ok)
        if normed:
            scale = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * half) + eps)[:, None]
            x1, x2 = x1 * scale * w1, x2 * scale * w2
        base = out + batch * out_batch + head * out_head
        step = at * (2 * half) + columns[None, :]
        tl.store(base + step, (x1 * c - x2 * s).to(out.dtype.element_ty), mask=ok)
        tl.store(base + half + step, (x2 * c + x1 * s).to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["seq", "heads", "group_heads"])
def rotate_backward(
    grad,
    x,
    weight,
    cos,
    sin,
    grad_x,
    grad_weight,
    seq,
    heads,
    group_heads,
    eps,
    grad_seq,
    grad_batch,
    grad_head,
    x_seq,
    x_batch,
    x_group,
    x_head,
    table_seq,
    table_batch,
    out_seq,
    out_batch,
    normed: tl.constexpr,
    half: tl.constexpr,
    block_half: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_heads: tl.constexpr,
):
    """Grad_x lies as [seq, batch, heads, 2 * half]; grad_weight gets one float32 row of each program."""
    rows = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    batch = tl.program_id(1).to(tl.int64)
    first_head = tl.program_id(2).to(tl.int64) * tile_heads
    columns = tl.arange(0, block_half)
    ok = (rows < seq)[:, None] & (columns < half)[None, :]
    at = rows.to(tl.int64)[:, None]
    angle = at * table_seq + batch * table_batch + columns[None, :]
    c, s = _load(cos, angle, ok), _load(sin, angle, ok)
    if normed:
        w1 = _load(weight, columns, columns < half)[None, :]
        w2 = _load(weight, half + columns, columns < half)[None, :]
        sum1 = tl.zeros((tile_rows, block_half), tl.float32)
        sum2 = tl.zeros((tile_rows, block_half), tl.float32)
    for head in range(first_head, tl.minimum(first_head + tile_heads, heads)):
        base = grad + batch * grad_batch + head * grad_head
        step = at * grad_seq + columns[None, :]
        g1, g2 = _load(base, step, ok), _load(base, half + step, ok)
        # The transpose of a rotation is the rotation by the opposite angle.
        d1, d2 = g1 * c + g2 * s, g2 * c - g1 * s
        if normed:
            base = x + batch * x_batch + (head // group_heads) * x_group + (head % group_heads) * x_head
            step = at * x_seq + columns[None, :]
            x1, x2 = _load(base, step, ok), _load(base, half + step, ok)
            # Made again from what is loaded anyway: cheaper than keeping it.
            scale = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / (2 * half) + eps)[:, None]
            x1, x2 = x1 * scale, x2 * scale
            sum1 += d1 * x1
            sum2 += d2 * x2
            d1, d2 = d1 * w1, d2 * w2
            along = (tl.sum(d1 * x1 + d2 * x2, 1) / (2 * half))[:, None]
            d1, d2 = (d1 - x1 * along) * scale, (d2 - x2 * along) * scale
        base = grad_x + batch * out_batch + head * (2 * half)
        step = at * out_seq + columns[None, :]
        tl.store(base + step, d1.to(grad_x.dtype.element_ty), mask=ok)
        tl.store(base + half + step, d2.to(grad_x.dtype.element_ty), mask=ok)
    if normed:
        tiles, batches = tl.num_programs(0).to(tl.int64), tl.num_programs(1)
        program = (tl.program_id(2) * batches + batch) * tiles + tl.program_id(0)
        base = grad_weight + program * (2 * half) + columns
        tl.store(base, tl.sum(sum1, 0), mask=columns < half)
        tl.store(base + half, tl.sum(sum2, 0), mask=columns < half)


def tile_sizes(half: int) -> dict[str, int]:
    """The constants of both kernels for a head of ``2 * half``."""
    block = triton.next_power_of_2(half)
    return {
        "half": half,
        "block_half": block,
        "tile_rows": max(1, NUMBERS // block),
        "tile_heads": TILE_HEADS,
    }


def compile_cases(shared_kib: int) -> list[CompileCase]:
    """Both kernels, with and without a norm."""
    sizes = dict.fromkeys(("seq", "heads", "group_heads"), "i32") | {"eps": "fp32"}
    strides = dict.fromkeys(("x_seq", "x_batch", "x_group", "x_head", "table_seq", "table_batch"), "i32")
    pointers = dict.fromkeys(("x", "weight", "cos", "sin"), "*bf16")
    outer = dict.fromkeys(("out_batch", "out_head"), "i32")
    forward = {**pointers, "out": "*bf16", **sizes, **strides, **outer}
    outer = dict.fromkeys(("grad_seq", "grad_batch", "grad_head", "out_seq", "out_batch"), "i32")
    backward = {
        "grad": "*bf16",
        **pointers,
        "grad_x": "*bf16",
        "grad_weight": "*fp32",
        **sizes,
        **strides,
        **outer,
    }
    cases = []
    for dim in (64, 96, 128):
        for normed in (True, False):
            for kernel, types in ((rotate_forward, forward), (rotate_backward, backward)):
                name = f"{kernel.__name__} D={dim} {'normed' if normed else 'plain'}"
                constants = {"normed": normed, **tile_sizes(dim // 2)}
                aligned = frozenset(n for n in types if types[n].startswith("*") or types[n] == "i32")
                cases.append(
                    CompileCase(
                        name=name,
                        kernel=kernel,
                        types=types,
                        constants=constants,
                        num_warps=NUM_WARPS,
                        num_stages=3,
                        tensor_cores=False,
                        aligned=aligned - {"seq", "heads", "group_heads"},
                    )
                )
    return cases
