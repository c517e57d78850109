"""The definition: every query sees every valid key."""

from __future__ import annotations

import torch
from torch import Tensor

from bdtrain_kernels.block_attention.reference import reference_attention


def reference_cache_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *, scale: float | None = None
) -> Tensor:
    """Explicit softmax in the dtype of the inputs.

    Args:
        q: [batch, heads, rows, head_dim].
        k: [batch, kv_heads, keys, head_dim].
        v: like ``k``.
        key_mask: True where a key is valid, bool [batch, keys]; None when all are.
        scale: factor of the scores; None is head_dim ** -0.5.

    Returns:
        [batch, heads, rows, head_dim].
    """
    if key_mask is None:
        key_mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    return reference_attention(q, k, v, key_mask[:, None, None, :], scale=scale)
