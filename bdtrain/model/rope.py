"""Rotary positions from given position numbers, in the half-split layout (pairs i and i + head_dim/2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines of a forward pass, made once and shared by its layers.

    Attributes:
        cos: [seq, batch or 1, 1, head_dim], both halves filled.
        sin: the same shape; the first half carries the minus sign of the rotation.
    """

    cos: Tensor
    sin: Tensor

    def rows(self, count: int) -> RopeTable:
        """The table of the first ``count`` rows of the sequence axis."""
        if count == self.cos.shape[0]:
            return self
        return RopeTable(self.cos[:count], self.sin[:count])


def make_rope_table(
    positions: Tensor, head_dim: int, *, base: float, angle_dtype: torch.dtype, dtype: torch.dtype
) -> RopeTable:
    """Angles of some positions.

    Args:
        positions: position numbers, int64 [seq], or [seq, batch] when rows of the batch stand at different
            places.
        head_dim: size of a head, even.
        base: base of the geometric series of wavelengths.
        angle_dtype: type of the angles. float32 gives the same bits as the Qwen3 code in transformers.
        dtype: type of the table.
    """
    exponent = (
        torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.int64).to(angle_dtype) / head_dim
    )
    inverse = 1.0 / base**exponent
    angle = positions.to(angle_dtype).unsqueeze(-1) * inverse
    cos, sin = angle.cos(), angle.sin()
    cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    shape = (positions.shape[0], 1, 1, head_dim) if positions.dim() == 1 else (*positions.shape, 1, head_dim)
    return RopeTable(cos.to(dtype).view(shape), sin.to(dtype).view(shape))


def rotate(x: Tensor, table: RopeTable) -> Tensor:
    """Turn queries or keys by their positions.

    Args:
        x: [seq, batch, heads, head_dim], any strides.
        table: angles of the same rows.

    Returns:
        The same shape; in memory the axes lie as [batch, heads, seq, head_dim], the order attention reads.

    Source: arXiv 2104.09864 (RoFormer), equation 34, with the pairs split by halves.
    """
    rotated: Tensor = _Rotate.apply(x, table.cos, table.sin)
    return rotated


class _Rotate(torch.autograd.Function):
    """One pass forward and one backward; plain autograd would keep four products per call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, transposed=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        # A rotation's transpose is the rotation by the opposite angle.
        return _turn(grad, cos, -sin, transposed=False), None, None


def _turn(x: Tensor, cos: Tensor, signed_sin: Tensor, *, transposed: bool) -> Tensor:
    seq, batch, heads, dim = x.shape
    if transposed:
        out = x.new_empty(batch, heads, seq, dim).permute(2, 0, 1, 3)
    else:
        out = x.new_empty(seq, batch, heads, dim)
    half = dim // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], signed_sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], signed_sin[..., half:])
    return out
