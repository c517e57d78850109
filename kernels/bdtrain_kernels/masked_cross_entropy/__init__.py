"""Head and cross-entropy of given rows, without the logits of all of them."""

from bdtrain_kernels.masked_cross_entropy.api import masked_cross_entropy, row_statistics
from bdtrain_kernels.masked_cross_entropy.reference import reference_cross_entropy, reference_statistics

__all__ = ["masked_cross_entropy", "reference_cross_entropy", "reference_statistics", "row_statistics"]
