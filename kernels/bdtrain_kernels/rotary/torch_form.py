"""The form of torch's own operators: few passes over memory, for CPUs and where Triton is not there.

16-bit inputs are computed in float32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def torch_rotation(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``rotate_heads`` of [seq, batch, groups, heads per group, head_dim]."""
    rotated: Tensor = (
        _Rotate.apply(x, cos, sin) if weight is None else _NormRotate.apply(x, cos, sin, weight, eps)
    )
    return rotated


class _NormRotate(torch.autograd.Function):
    """Norm and rotation: the weight goes into the table, so one pass is saved; 1 / rms is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, eps: float) -> Tensor:
        dim = x.shape[-1]
        wide = _widen(x)
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = scale.square_().div_(dim).add_(eps).rsqrt_()
        ctx.save_for_backward(x, cos, sin, weight, scale)
        cos, sin = _table(cos, sin, wide.dtype)
        first, second = weight.to(wide.dtype).chunk(2)
        out = _by_heads(wide)
        _turn(wide, (cos * first, sin * second, cos * second, sin * first), out).mul_(scale)
        return _join(out).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor, None]:  # type: ignore[override]
        x, cos, sin, weight, scale = ctx.saved_tensors
        wide, dim = _widen(x), x.shape[-1]
        # With g the gradient of normed heads n * weight, n = x * scale, that of x is
        # scale * (g * weight - n * mean(g * weight * n)).
        g = _turn_back(grad, cos, sin, wide)
        product = (g * wide).mul_(scale)
        grad_weight = product.flatten(0, -2).sum(0)
        along = torch.matmul(product, weight.to(wide.dtype)).unsqueeze(-1).mul_(scale).div_(-dim)
        g.mul_(weight).addcmul_(wide, along).mul_(scale)
        return g.to(x.dtype), None, None, grad_weight.to(weight.dtype), None


class _Rotate(torch.autograd.Function):
    """The rotation alone, which keeps nothing but the table."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads = x.shape[2:4]
        wide = _widen(x)
        cos, sin = _table(cos, sin, wide.dtype)
        return _join(_turn(wide, (cos, sin, cos, sin), _by_heads(wide))).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        like = _widen(grad.unflatten(2, ctx.heads))
        cos, sin = ctx.saved_tensors
        return _turn_back(grad, cos, sin, like).to(grad.dtype), None, None


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _table(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines with an axis each for groups and heads."""
    return cos[:, :, None, None].to(dtype), sin[:, :, None, None].to(dtype)


def _by_heads(x: Tensor) -> Tensor:
    """Room for [seq, batch, groups, heads, dim] that lies as [batch, groups, heads, seq, dim]."""
    seq, batch, groups, heads, dim = x.shape
    return x.new_empty(batch, groups, heads, seq, dim).permute(3, 0, 1, 2, 4)


def _join(x: Tensor) -> Tensor:
    """Groups and heads as one axis; a view, since they lie in order."""
    return x.flatten(2, 3)


def _turn(x: Tensor, table: tuple[Tensor, Tensor, Tensor, Tensor], out: Tensor) -> Tensor:
    """(x1 * a - x2 * b, x2 * c + x1 * d) for the halves of ``x`` and the four tables, into ``out``."""
    (x1, x2), (out1, out2) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(x1, table[0], out=out1).addcmul_(x2, table[1], value=-1)
    torch.mul(x2, table[2], out=out2).addcmul_(x1, table[3])
    return out


def _turn_back(grad: Tensor, cos: Tensor, sin: Tensor, like: Tensor) -> Tensor:
    """The gradient turned by the opposite angles, which is the transpose; contiguous, as ``x`` is ordered."""
    cos, sin = _table(cos, sin, like.dtype)
    grad = grad.unflatten(2, like.shape[2:4]).to(like.dtype)
    return _turn(grad, (cos, -sin, cos, -sin), like.new_empty(like.shape))
