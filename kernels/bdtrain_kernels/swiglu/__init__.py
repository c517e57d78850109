"""The gated activation between the two projections of the feed-forward part."""

from bdtrain_kernels.swiglu.api import swiglu
from bdtrain_kernels.swiglu.reference import reference_swiglu

__all__ = ["reference_swiglu", "swiglu"]
