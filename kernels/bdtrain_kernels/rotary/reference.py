"""The definition: RMS norm over a head, then the rotation as a product of complex numbers, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_rotation(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """Norm and rotation of every head.

    Args:
        x: [seq, batch, heads, head_dim] or [seq, batch, groups, heads per group, head_dim].
        cos: cosines, [seq, batch or 1, head_dim / 2].
        sin: sines, like ``cos``.
        weight: of the norm, [head_dim]; None for the rotation alone.
        eps: added to the mean square.

    Returns:
        float64 [seq, batch, heads, head_dim].
    """
    x = x.double()
    if x.dim() == 5:
        x = x.flatten(2, 3)
    if weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    first, second = x.chunk(2, -1)
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double()).unsqueeze(2)
    return torch.cat((turned.real, turned.imag), -1)
