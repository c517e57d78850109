"""The definition, in float64."""

from __future__ import annotations

from torch import Tensor


def reference_rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMS norm: x / sqrt(mean(x^2) + eps) * weight.

    Args:
        x: [..., hidden].
        weight: [hidden].
        eps: added to the mean square.

    Returns:
        float64, the shape of ``x``.
    """
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
