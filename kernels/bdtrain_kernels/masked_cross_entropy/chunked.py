"""Chunked form: logits of a few rows at a time, gradients made while they are there.

The gradient of the hidden rows is linear in each row's incoming gradient, so it is made once with 1 and
scaled later. The gradients of weight and bias mix rows, so they need the incoming gradients beforehand: the
caller may announce them (``row_weights``). If what arrives in backward is the announced vector times one
number, the sums made in forward are scaled by it; otherwise the chunks are computed again. Both give the
same gradients; the second costs one more product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class ChunkedCrossEntropy(torch.autograd.Function):
    """nll of rows; see ``masked_cross_entropy`` for the arguments, all validated there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        excluded: Tensor | None,
        row_weights: Tensor | None,
        vocab_size: int,
        chunk_rows: int,
        with_gradient: bool,
    ) -> Tensor:
        """Nll [rows], and with ``row_weights`` the gradients of its weighted sum."""
        rows = hidden.shape[0]
        nll = torch.empty(rows, dtype=_accumulation_dtype(hidden), device=hidden.device)
        announced = row_weights if with_gradient else None
        grads = None if announced is None else _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        for begin in range(0, rows, chunk_rows):
            chunk = slice(begin, begin + chunk_rows)
            target = targets[chunk].unsqueeze(1)
            logits = _logits(hidden[chunk], weight, bias, excluded, vocab_size)
            shift = logits.amax(dim=-1, keepdim=True)
            logits.sub_(shift)
            at_target = logits.gather(1, target)
            total = logits.exp_().sum(dim=-1, keepdim=True)
            nll[chunk] = (total.log() - at_target).squeeze(1)
            if grads is not None and announced is not None:
                grads.add(chunk, logits.div_(total), target, announced[chunk])
        ctx.vocab_size, ctx.chunk_rows, ctx.one_pass = vocab_size, chunk_rows, grads is not None
        if with_gradient:
            made = (None, None, None) if grads is None else (grads.hidden, grads.weight, grads.bias)
            ctx.save_for_backward(hidden, weight, bias, targets, excluded, row_weights, *made)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias."""
        hidden, weight, bias, targets, excluded, row_weights, *made = ctx.saved_tensors
        factor = _common_factor(grad, row_weights) if ctx.one_pass else None
        if factor is not None:
            grad_hidden, grad_weight, grad_bias = made
            scaled_weight = None if grad_weight is None else grad_weight * factor.to(grad_weight.dtype)
            scaled_bias = None if grad_bias is None else grad_bias * factor.to(grad_bias.dtype)
        else:
            grads = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
            for begin in range(0, hidden.shape[0], ctx.chunk_rows):
                chunk = slice(begin, begin + ctx.chunk_rows)
                logits = _logits(hidden[chunk], weight, bias, excluded, ctx.vocab_size)
                logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
                logits.div_(logits.sum(dim=-1, keepdim=True))
                grads.add(chunk, logits, targets[chunk].unsqueeze(1), grad[chunk])
            grad_hidden, scaled_weight, scaled_bias = grads.hidden, grads.weight, grads.bias
        return (
            None if grad_hidden is None else (grad_hidden * grad.unsqueeze(1)).to(hidden.dtype),
            None if scaled_weight is None else scaled_weight.to(weight.dtype),
            None if scaled_bias is None else scaled_bias.to(bias.dtype),
            *([None] * 6),
        )


class _Gradients:
    """Sums over chunks, in the accumulation dtype; ``hidden`` is for an incoming gradient of 1 per row."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...]) -> None:
        dtype = _accumulation_dtype(hidden)
        self._input, self._weight = hidden, weight
        self.hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if needed[0] else None
        self.weight = weight.new_zeros(weight.shape, dtype=dtype) if needed[1] else None
        self.bias = bias.new_zeros(bias.shape, dtype=dtype) if bias is not None and needed[2] else None

    def add(self, chunk: slice, probabilities: Tensor, target: Tensor, row_grad: Tensor) -> None:
        """Add a chunk's share; ``probabilities`` [rows, vocab] are used up, ``target`` is [rows, 1]."""
        vocab = probabilities.shape[1]
        # d nll / d logits = probabilities - one-hot
        probabilities.scatter_add_(1, target, torch.full_like(target, -1, dtype=probabilities.dtype))
        if self.bias is not None:
            self.bias[:vocab].addmv_(probabilities.t(), row_grad.to(probabilities.dtype))
        score_grad = probabilities.to(self._weight.dtype)
        if self.hidden is not None:
            self.hidden[chunk] = score_grad @ self._weight[:vocab]
        if self.weight is not None:
            rows = self._input[chunk] * row_grad.to(self._input.dtype).unsqueeze(1)
            if rows.dtype == self.weight.dtype:
                self.weight[:vocab].addmm_(score_grad.t(), rows)
            else:
                self.weight[:vocab] += score_grad.t() @ rows


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, excluded: Tensor | None, vocab_size: int
) -> Tensor:
    """Fresh logits of the real vocabulary, [rows, vocab_size], the excluded ids at -inf."""
    bias = None if bias is None else bias[:vocab_size]
    logits = torch.nn.functional.linear(hidden, weight[:vocab_size], bias).to(_accumulation_dtype(hidden))
    return logits if excluded is None else logits.index_fill_(1, excluded, -torch.inf)


def _common_factor(grad: Tensor, announced: Tensor) -> Tensor | None:
    """The number that ``announced`` must be multiplied with to give ``grad``, None when there is none.

    Waits for the device, once per backward.
    """
    if announced.numel() == 0:
        return grad.new_zeros(())
    announced = announced.to(grad.dtype)
    largest = announced.abs().argmax()
    if not bool(announced[largest]):
        return grad.new_zeros(()) if not bool(grad.any()) else None
    factor = grad[largest] / announced[largest]
    # A caller's (weights * nll).sum() / count rounds each product once or twice.
    tolerance = 4 * torch.finfo(grad.dtype).eps
    fits = torch.isclose(grad, announced * factor, rtol=tolerance, atol=0.0).all()
    return factor if bool(fits) else None


def _accumulation_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
