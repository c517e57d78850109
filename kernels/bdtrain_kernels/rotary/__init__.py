"""Norm of each head and rotation by position in one pass, from the fused projection to attention's layout."""

from bdtrain_kernels.rotary.api import rotate_heads
from bdtrain_kernels.rotary.reference import reference_rotation

__all__ = ["reference_rotation", "rotate_heads"]
