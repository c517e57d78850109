"""Sums of gradients over chunks."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bdtrain_kernels.masked_cross_entropy.plan import accumulation_dtype


class GradientSums:
    """Gradients of this rank's part of the head; those of weight and bias add up in the accumulation dtype.

    Args:
        hidden: [rows, hidden].
        weight: [padded vocab, hidden].
        bias: [padded vocab] or None.
        needed: whether the gradient of hidden, weight, bias is asked for.

    Attributes:
        hidden: [rows, hidden] in its own dtype: each row is one product, nothing is added up in it. With a
            shared vocabulary it is this rank's share.
        weight: [padded vocab, hidden], float32 or float64.
        bias: [padded vocab], like ``weight``.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...]) -> None:
        """Start from zero."""
        dtype = accumulation_dtype(hidden)
        self._input, self._head = hidden.detach(), weight.detach()
        self.hidden = (
            torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if needed[0] else None
        )
        self.weight = weight.new_zeros(weight.shape, dtype=dtype) if needed[1] else None
        self.bias = bias.new_zeros(bias.shape, dtype=dtype) if bias is not None and needed[2] else None

    def add(self, chunk: slice, scores: Tensor, row_grad: Tensor | None) -> None:
        """Add a chunk's share.

        Args:
            chunk: its rows.
            scores: gradient of the logits of the head's first rows, [rows, columns].
            row_grad: what each row is to be multiplied by for weight and bias, [rows]; ``hidden`` is left
                without it. None for 1.
        """
        columns = scores.shape[1]
        if self.bias is not None:
            # Multiplied in the dtype of the sums: in 16 bits equal weights would all be rounded to one side.
            weighted = scores if row_grad is None else scores * row_grad.to(self.bias.dtype).unsqueeze(1)
            self.bias[:columns] += weighted.sum(dim=0, dtype=self.bias.dtype)
        low = scores.to(self._head.dtype)
        if self.hidden is not None:
            torch.mm(low, self._head[:columns], out=self.hidden[chunk])
        if self.weight is not None:
            rows = self._input[chunk]
            if row_grad is not None:
                rows = (rows * row_grad.to(self.weight.dtype).unsqueeze(1)).to(rows.dtype)
            _add_product(self.weight[:columns], low.t(), rows)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to ``total``, whose dtype may be wider."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and _adds_wider_in_place(a.dtype, total.dtype):
        # The tensor cores add up in float32 anyway: no copy in 16 bits, no second pass over the sums.
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@functools.cache
def _adds_wider_in_place(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether this torch adds a 16-bit product to wider sums in place, tried once on numbers known exactly.

    The argument is young: some versions refuse the type, or the output being the summand.
    """
    total = torch.full((16, 16), 1.0 + 2.0**-20, dtype=wide, device="cuda")
    ones = torch.ones((16, 16), dtype=narrow, device="cuda")
    try:
        torch.addmm(total, ones, ones, out_dtype=wide, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool(((total - 17.0).abs() < 1e-5).all())
