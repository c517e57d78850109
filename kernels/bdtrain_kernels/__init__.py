"""Kernels of block diffusion training: attention over noisy and clean streams, and the head with its loss.

Each kernel has a ``reference`` in plain torch, which is its definition, faster forms that are tested against
it, and one public function. Nothing here knows of the training framework: layouts are any object with the
attributes that ``block_attention`` names.
"""

from bdtrain_kernels.block_attention import PreparedLayout, block_attention, dense_mask, prepare
from bdtrain_kernels.cache_attention import cache_attention
from bdtrain_kernels.errors import BackendUnavailableError, KernelShapeError
from bdtrain_kernels.masked_cross_entropy import masked_cross_entropy

__all__ = [
    "BackendUnavailableError",
    "KernelShapeError",
    "PreparedLayout",
    "block_attention",
    "cache_attention",
    "dense_mask",
    "masked_cross_entropy",
    "prepare",
]
