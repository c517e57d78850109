"""The form of torch's own operators: few passes, and no memory beside input, result and gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def torch_swiglu(x: Tensor) -> Tensor:
    """``swiglu`` in two passes, and four in backward."""
    activated: Tensor = _SwiGLU.apply(x)
    return activated


class _SwiGLU(torch.autograd.Function):
    """Keeps the input alone; plain autograd keeps silu(gate) as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        grad_x = x.new_empty(x.shape)
        grad_gate, grad_up = grad_x.chunk(2, -1)
        # The place of one half serves as scratch for the other.
        torch.mul(grad, up, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_up, gate, grad_input=grad_gate)
        torch.ops.aten.silu.out(gate, out=grad_up)
        grad_up.mul_(grad)
        return grad_x
