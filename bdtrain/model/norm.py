"""Norms over the last axis, with the constructors by which Megatron builds them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdtrain.model.config import BDTransformerConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis.

    The constructor's keywords are Megatron's: it builds norms by ``config``, ``hidden_size`` and ``eps``.
    """

    def __init__(self, config: BDTransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        """See the class."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., hidden]."""
        if x.is_cpu and x.dtype in (torch.float32, torch.float64):
            normed: Tensor = _CpuRMSNorm.apply(x, self.weight, self.eps)
            return normed
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis; keywords as ``RMSNorm``."""

    def __init__(self, config: BDTransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        """See the class."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., hidden]."""
        weight, bias = self.weight, self.bias
        if x.is_cpu and x.dtype in (torch.bfloat16, torch.float16):
            # torch's CPU form adds up the gradients of weight and bias in 16 bits: 7% and 33% off after 4096
            # rows. CUDA's adds in float32.
            wide = F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), self.eps)
            return wide.to(x.dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


class _CpuRMSNorm(torch.autograd.Function):
    """The same in few passes: torch has no fused form for CPUs and takes twice as many kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        product = normed * grad
        grad_weight = product.flatten(0, -2).sum(0)
        mean = (product @ weight).unsqueeze(-1).div_(-x.shape[-1])
        return (grad * weight).addcmul_(normed, mean).mul_(scale), grad_weight, None


def norm_class(config: BDTransformerConfig) -> type[RMSNorm] | type[LayerNorm]:
    """The norm of the configured shape."""
    return LayerNorm if config.biased else RMSNorm
