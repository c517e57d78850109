"""Rotary positions from given position numbers, in the half-split layout (pairs i and i + head_dim/2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines of a forward pass, made once and shared by its layers.

    Attributes:
        cos: [seq, batch or 1, head_dim / 2], one angle per pair.
        sin: the same shape.
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
    if positions.dim() == 1:
        positions = positions.unsqueeze(1)
    angle = positions.to(angle_dtype).unsqueeze(-1) * inverse
    return RopeTable(angle.cos().to(dtype), angle.sin().to(dtype))
