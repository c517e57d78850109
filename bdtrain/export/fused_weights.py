"""Megatron's fused weights taken apart and put together, on plain tensors; differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def split_qkv(
    fused: Tensor, *, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of queries, keys and values from the fused weight: [queries, key, value] per query group.

    Args:
        fused: [(num_heads + 2 * num_kv_heads) * head_dim, ...].
        num_heads: query heads.
        num_kv_heads: key heads, one per query group.
        head_dim: size of a head.

    Returns:
        [num_heads * head_dim, ...] and twice [num_kv_heads * head_dim, ...], heads in order.
    """
    queries = num_heads // num_kv_heads * head_dim
    groups = fused.unflatten(0, (num_kv_heads, queries + 2 * head_dim))
    query, key, value = groups.split((queries, head_dim, head_dim), dim=1)
    return query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)


def fuse_qkv(query: Tensor, key: Tensor, value: Tensor, *, num_kv_heads: int) -> Tensor:
    """The inverse of ``split_qkv``."""
    groups = [x.unflatten(0, (num_kv_heads, -1)) for x in (query, key, value)]
    return torch.cat(groups, dim=1).flatten(0, 1)


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """``x`` with zero rows appended up to ``rows``."""
    if x.shape[0] == rows:
        return x
    return torch.cat((x, x.new_zeros(rows - x.shape[0], *x.shape[1:])))
