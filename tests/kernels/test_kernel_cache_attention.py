"""cache_attention against explicit softmax in float64."""

from __future__ import annotations

import pytest
import torch

from bdtrain_kernels import KernelShapeError, cache_attention
from bdtrain_kernels.cache_attention import reference_cache_attention


def tensors(heads: int, kv_heads: int, rows: int, keys: int):
    generator = torch.Generator().manual_seed(heads * 100 + keys)
    q = torch.randn(3, heads, rows, 16, generator=generator)
    k, v = (torch.randn(3, kv_heads, keys, 16, generator=generator) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("heads,kv_heads", ((1, 1), (4, 2), (8, 1), (6, 6)))
@pytest.mark.parametrize("rows,keys", ((1, 1), (4, 36), (16, 77)))
def test_every_query_sees_every_valid_key(heads, kv_heads, rows, keys):
    q, k, v = tensors(heads, kv_heads, rows, keys)
    valid = torch.arange(keys) < torch.tensor([[1], [keys // 2 + 1], [keys]])
    for mask in (None, valid):
        expected = reference_cache_attention(q.double(), k.double(), v.double(), mask)
        for group in (q, q.transpose(1, 2).contiguous().transpose(1, 2)):
            found = cache_attention(group, k, v, mask)
            assert (found.double() - expected).norm() <= 2e-6 * expected.norm()


def test_invalid_keys_do_not_change_one_bit():
    q, k, v = tensors(4, 2, 4, 20)
    mask = (torch.arange(20) < 13).expand(3, 20)
    before = cache_attention(q, k, v, mask)
    k[:, :, 13:] = 1e4
    v[:, :, 13:] = -7.0
    assert torch.equal(before, cache_attention(q, k, v, mask))


def test_masks_and_heads_that_do_not_fit_are_refused():
    q, k, v = tensors(4, 2, 4, 20)
    with pytest.raises(KernelShapeError, match=r"bool \[batch, keys\]"):
        cache_attention(q, k, v, torch.ones(3, 19, dtype=torch.bool))
    with pytest.raises(KernelShapeError, match="kv_heads dividing heads"):
        cache_attention(q[:, :3], k, v)
