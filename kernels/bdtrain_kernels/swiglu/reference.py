"""The definition, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_swiglu(x: Tensor) -> Tensor:
    """Gate times its sigmoid times the other half.

    Args:
        x: [..., 2 ffn]: the gate, then what it opens.

    Returns:
        float64 [..., ffn].
    """
    gate, up = x.double().chunk(2, -1)
    return gate * torch.sigmoid(gate) * up
