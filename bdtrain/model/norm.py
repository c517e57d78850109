"""Norms over the last axis, with the constructors by which Megatron builds them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdtrain.model.config import BDTransformerConfig
from bdtrain.model.rope import RopeTable
from bdtrain_kernels.rms_norm import rms_norm
from bdtrain_kernels.rotary import rotate_heads


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
        return rms_norm(x, self.weight, eps=self.eps)


class HeadNorm(RMSNorm):
    """RMSNorm of queries or keys over head_dim, and their rotation, in one pass.

    Here and not in attention, because ZeRO stage 3 gathers a weight around the forward pass of its own module
    only.
    """

    def forward(self, x: Tensor, table: RopeTable) -> Tensor:  # type: ignore[override]
        """Normalise and turn heads.

        Args:
            x: [seq, batch, heads, head_dim] or [seq, batch, groups, heads per group, head_dim], any strides.
            table: angles of the same rows.

        Returns:
            [seq, batch, heads, head_dim]; in memory the axes lie as [batch, heads, seq, head_dim], the order
            attention reads.
        """
        return rotate_heads(x, table.cos, table.sin, self.weight, eps=self.eps)


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


def norm_class(config: BDTransformerConfig) -> type[RMSNorm] | type[LayerNorm]:
    """The norm of the configured shape."""
    return LayerNorm if config.biased else RMSNorm
