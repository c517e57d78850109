"""Norms with the marks that Megatron puts on weights which every tensor-parallel rank holds."""

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
        _mark_replicated(self, config)

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
        _mark_replicated(self, config)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., hidden]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


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


def _mark_replicated(module: nn.Module, config: BDTransformerConfig) -> None:
    # Megatron's own attribute: such a weight has a partial gradient on each tensor-parallel rank.
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
