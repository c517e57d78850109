"""SwiGLU in Triton: float32 between loading and storing."""

from __future__ import annotations

import triton
import triton.language as tl

from bdtrain_kernels.compile_cases import CompileCase

NUMBERS = 1024
"""Numbers of a tile: 8 for each of the 128 threads, one 16-byte load of a 16-bit type."""

NUM_WARPS = 4


@triton.jit
def _load(pointer, step, ok):
    return tl.load(pointer + step, mask=ok, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def swiglu_forward(x, out, rows, ffn, x_row, tile_rows: tl.constexpr, tile_columns: tl.constexpr):
    """Out is contiguous, [rows, ffn]; x is [rows, 2 ffn]."""
    row = (tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * tile_columns + tl.arange(0, tile_columns))[None, :]
    ok = (row < rows) & (column < ffn)
    gate, up = _load(x, row * x_row + column, ok), _load(x, row * x_row + ffn + column, ok)
    tl.store(out + row * ffn + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows"])
def swiglu_backward(
    grad, x, grad_x, rows, ffn, grad_row, x_row, tile_rows: tl.constexpr, tile_columns: tl.constexpr
):
    """Grad_x is contiguous, [rows, 2 ffn]."""
    row = (tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * tile_columns + tl.arange(0, tile_columns))[None, :]
    ok = (row < rows) & (column < ffn)
    gate, up = _load(x, row * x_row + column, ok), _load(x, row * x_row + ffn + column, ok)
    g = _load(grad, row * grad_row + column, ok)
    sigmoid = tl.sigmoid(gate)
    grad_gate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
    at = grad_x + row * (2 * ffn) + column
    tl.store(at, grad_gate.to(grad_x.dtype.element_ty), mask=ok)
    tl.store(at + ffn, (g * gate * sigmoid).to(grad_x.dtype.element_ty), mask=ok)


def tile_sizes(ffn: int) -> dict[str, int]:
    """The constants of both kernels."""
    block = min(NUMBERS, triton.next_power_of_2(ffn))
    return {"tile_rows": NUMBERS // block, "tile_columns": block}


def compile_cases(shared_kib: int) -> list[CompileCase]:
    """Both kernels: a wide layer, and one narrower than a tile."""
    forward = {"x": "*bf16", "out": "*bf16", "rows": "i32", "ffn": "i32", "x_row": "i32"}
    backward = {
        **dict.fromkeys(("grad", "x", "grad_x"), "*bf16"),
        **dict.fromkeys(("rows", "ffn", "grad_row", "x_row"), "i32"),
    }
    return [
        CompileCase(
            name=f"{kernel.__name__} ffn {ffn}",
            kernel=kernel,
            types=types,
            constants=tile_sizes(ffn),
            num_warps=NUM_WARPS,
            num_stages=3,
            tensor_cores=False,
            aligned=frozenset(types) - {"rows"},
        )
        for ffn in (192, 11264)
        for kernel, types in ((swiglu_forward, forward), (swiglu_backward, backward))
    ]
