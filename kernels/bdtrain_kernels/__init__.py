"""Kernels of block diffusion training: attention over noisy and clean streams, and the head with its loss.

Each kernel has a ``reference`` in plain torch, which is its definition, faster forms that are tested against
it, and one public function. Nothing here knows of the training framework: layouts are any object with the
attributes that ``block_attention`` names.
"""

from bdtrain_kernels.block_attention import (
    PreparedLayout,
    block_attention,
    check_attention_backend,
    dense_mask,
    prepare,
)
from bdtrain_kernels.cache_attention import cache_attention
from bdtrain_kernels.dispatch import choices_heard
from bdtrain_kernels.errors import BackendUnavailableError, KernelShapeError
from bdtrain_kernels.masked_cross_entropy import masked_cross_entropy, row_statistics
from bdtrain_kernels.rms_norm import rms_norm
from bdtrain_kernels.rotary import rotate_heads
from bdtrain_kernels.swiglu import swiglu

__all__ = [
    "BackendUnavailableError",
    "KernelShapeError",
    "PreparedLayout",
    "block_attention",
    "cache_attention",
    "check_attention_backend",
    "choices_heard",
    "dense_mask",
    "masked_cross_entropy",
    "prepare",
    "rms_norm",
    "rotate_heads",
    "row_statistics",
    "swiglu",
]
