"""Queries of a block against the cache: no structure, so one fused call; the GQA group becomes rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bdtrain_kernels.errors import KernelShapeError


def cache_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Attention of every query to every valid key.

    All query heads of a group read the same keys and there is no mask between rows, so the group is folded
    into the rows and the keys are never repeated.

    Args:
        q: queries, [batch, heads, rows, head_dim].
        k: cached keys followed by the block's own, [batch, kv_heads, keys, head_dim]; kv_heads divides heads.
        v: values, like ``k``.
        key_mask: True where a key is valid, bool [batch, keys]; every batch row needs at least one. None
            when all are.
        scale: factor of the scores; None is head_dim ** -0.5.

    Returns:
        [batch, heads, rows, head_dim].

    Raises:
        KernelShapeError: if the shapes do not fit each other.
    """
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise KernelShapeError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; they must be [batch, heads, rows, "
            f"head_dim] and [batch, kv_heads, keys, head_dim] with kv_heads dividing heads"
        )
    mask = None
    if key_mask is not None:
        if key_mask.dtype != torch.bool or key_mask.shape != (k.shape[0], k.shape[2]):
            raise KernelShapeError(
                f"key_mask is {key_mask.dtype} {tuple(key_mask.shape)}; it must be bool [batch, keys] = "
                f"{(k.shape[0], k.shape[2])}"
            )
        mask = key_mask[:, None, None, :]
    batch, heads, rows, head_dim = q.shape
    folded = q.reshape(batch, k.shape[1], heads // k.shape[1] * rows, head_dim)
    return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale).view(
        batch, heads, rows, head_dim
    )
