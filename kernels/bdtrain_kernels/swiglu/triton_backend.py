"""Launches of the Triton form, as operators that torch.compile and recomputation see as one."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from bdtrain_kernels.swiglu.triton_kernels import NUM_WARPS, swiglu_backward, swiglu_forward, tile_sizes


@torch.library.custom_op("bdtrain_kernels::swiglu", mutates_args=())
def swiglu_op(x: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 ffn]."""
    out = _half(x)
    if out.numel() == 0:
        return out
    flat, ffn = _rows(x), out.shape[-1]
    sizes = tile_sizes(ffn)
    swiglu_forward[_grid(len(flat), ffn, sizes)](
        flat, out, len(flat), ffn, flat.stride(0), **sizes, num_warps=NUM_WARPS
    )
    return out


@swiglu_op.register_fake
def _(x: Tensor) -> Tensor:
    return _half(x)


@torch.library.custom_op("bdtrain_kernels::swiglu_backward", mutates_args=())
def swiglu_backward_op(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of ``x``."""
    grad_x = x.new_empty(x.shape)
    if grad_x.numel() == 0:
        return grad_x
    flat_grad, flat, ffn = _rows(grad), _rows(x), grad.shape[-1]
    sizes = tile_sizes(ffn)
    swiglu_backward[_grid(len(flat), ffn, sizes)](
        flat_grad,
        flat,
        grad_x,
        len(flat),
        ffn,
        flat_grad.stride(0),
        flat.stride(0),
        **sizes,
        num_warps=NUM_WARPS,
    )
    return grad_x


@swiglu_backward_op.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return swiglu_backward_op(grad, x)


swiglu_op.register_autograd(_backward, setup_context=_save)


def _half(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _rows(x: Tensor) -> Tensor:
    """[rows, columns] with a dense last axis; a copy only where no view does it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _grid(rows: int, ffn: int, sizes: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(rows, sizes["tile_rows"]), triton.cdiv(ffn, sizes["tile_columns"])
