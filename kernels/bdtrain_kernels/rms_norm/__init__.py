"""RMS norm over the last axis."""

from bdtrain_kernels.rms_norm.api import rms_norm
from bdtrain_kernels.rms_norm.reference import reference_rms_norm

__all__ = ["reference_rms_norm", "rms_norm"]
