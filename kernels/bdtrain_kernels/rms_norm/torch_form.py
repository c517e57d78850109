"""The form of torch's own operators: few passes; 16-bit inputs are computed in float32 and rounded once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm`` in a few passes."""
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


class _RMSNorm(torch.autograd.Function):
    """Keeps the input and 1 / rms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _widen(x)
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        grad, wide = _widen(grad), _widen(x)
        # With n = x * scale the gradient of x is scale * (grad * weight - n * mean(grad * weight * n)).
        product = (grad * wide).mul_(scale)
        grad_weight = product.reshape(-1, x.shape[-1]).sum(0)
        along = torch.matmul(product, weight.to(wide.dtype)).unsqueeze(-1).mul_(scale).div_(-x.shape[-1])
        grad_x = (grad * weight).addcmul_(wide, along).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
