"""Launches of the Triton form, as operators that torch.compile and recomputation see as one."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from bdtrain_kernels.rotary.triton_kernels import NUM_WARPS, rotate_backward, rotate_forward, tile_sizes


@torch.library.custom_op("bdtrain_kernels::rotate_heads", mutates_args=())
def rotate_heads_op(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``rotate_heads`` of [seq, batch, groups, heads per group, head_dim]."""
    seq, batch, groups, heads, dim = x.shape
    x, (cos, sin) = _last_axis_dense(x), _same_strides(cos, sin)
    out = _empty_result(x)
    if out.numel() == 0:
        return out
    sizes = tile_sizes(dim // 2)
    grid = _grid(seq, batch, groups * heads, sizes)
    rotate_forward[grid](
        x,
        x if weight is None else weight.contiguous(),
        cos,
        sin,
        out,
        seq,
        groups * heads,
        heads,
        eps,
        *x.stride()[:4],
        *_table_strides(cos),
        out.stride(1),
        out.stride(2),
        normed=weight is not None,
        **sizes,
        num_warps=NUM_WARPS,
    )
    return out


@rotate_heads_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return _empty_result(x)


@torch.library.custom_op("bdtrain_kernels::rotate_heads_backward", mutates_args=())
def rotate_heads_backward_op(
    grad: Tensor,
    x: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    eps: float,
    group_heads: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and of the weight; an empty tensor for the latter where there is none."""
    seq, batch, heads, dim = grad.shape
    grad, (cos, sin) = _last_axis_dense(grad), _same_strides(cos, sin)
    normed = weight is not None and x is not None
    grad_x = _empty_gradient(grad, group_heads)
    sizes = tile_sizes(dim // 2)
    grid = _grid(seq, batch, heads, sizes)
    programs = grid[0] * grid[1] * grid[2] if normed else 0
    partial = torch.empty(programs, dim, dtype=torch.float32, device=grad.device)
    if grad.numel():
        # Without a norm the kernel reads neither of them.
        source = _last_axis_dense(x) if x is not None else grad_x
        rotate_backward[grid](
            grad,
            source,
            weight.contiguous() if weight is not None else grad_x,
            cos,
            sin,
            grad_x,
            partial,
            seq,
            heads,
            group_heads,
            eps,
            *grad.stride()[:3],
            *source.stride()[:4],
            *_table_strides(cos),
            *grad_x.stride()[:2],
            normed=normed,
            **sizes,
            num_warps=NUM_WARPS,
        )
    if weight is None:
        return grad_x, grad.new_empty(0)
    return grad_x, partial.sum(0).to(weight.dtype)


@rotate_heads_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    eps: float,
    group_heads: int,
) -> tuple[Tensor, Tensor]:
    empty = grad.new_empty(0) if weight is None else torch.empty_like(weight)
    return _empty_gradient(grad, group_heads), empty


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, weight, eps = inputs
    ctx.eps, ctx.group_heads = eps, x.shape[3]
    # The gradient of a rotation does not need what was turned.
    ctx.save_for_backward(None if weight is None else x, cos, sin, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None, None]:
    x, cos, sin, weight = ctx.saved_tensors
    grad_x, grad_weight = rotate_heads_backward_op(grad, x, cos, sin, weight, ctx.eps, ctx.group_heads)
    return grad_x, None, None, None if weight is None else grad_weight, None


rotate_heads_op.register_autograd(_backward, setup_context=_save)


def _empty_result(x: Tensor) -> Tensor:
    seq, batch, groups, heads, dim = x.shape
    return x.new_empty(batch, groups * heads, seq, dim).permute(2, 0, 1, 3)


def _empty_gradient(grad: Tensor, group_heads: int) -> Tensor:
    seq, batch, heads, dim = grad.shape
    return grad.new_empty(seq, batch, heads // group_heads, group_heads, dim)


def _last_axis_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _same_strides(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both tables with a dense last axis and equal strides: the kernels have one set for both."""
    if cos.stride() == sin.stride() and cos.stride(-1) == 1:
        return cos, sin
    return cos.contiguous(), sin.contiguous()


def _table_strides(cos: Tensor) -> tuple[int, int]:
    return cos.stride(0), cos.stride(1) if cos.shape[1] > 1 else 0


def _grid(seq: int, batch: int, heads: int, sizes: dict[str, int]) -> tuple[int, int, int]:
    return triton.cdiv(seq, sizes["tile_rows"]), batch, triton.cdiv(heads, sizes["tile_heads"])
