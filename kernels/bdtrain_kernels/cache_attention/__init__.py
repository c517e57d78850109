"""Attention of a block's queries to cached and own keys, for generation."""

from bdtrain_kernels.cache_attention.api import cache_attention
from bdtrain_kernels.cache_attention.reference import reference_cache_attention

__all__ = ["cache_attention", "reference_cache_attention"]
