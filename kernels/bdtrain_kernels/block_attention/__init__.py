"""Attention over noisy copies and the clean stream of block diffusion."""

from bdtrain_kernels.block_attention.api import PreparedLayout, block_attention, prepare
from bdtrain_kernels.block_attention.reference import dense_mask, reference_attention
from bdtrain_kernels.block_attention.support import check_attention_backend

__all__ = [
    "PreparedLayout",
    "block_attention",
    "check_attention_backend",
    "dense_mask",
    "prepare",
    "reference_attention",
]
