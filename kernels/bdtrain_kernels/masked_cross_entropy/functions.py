"""The autograd functions: logits of a few rows at a time, gradients made while they are there.

The gradient of the hidden rows is linear in each row's incoming gradient, so it is made once with 1 and
scaled later. The gradients of weight and bias mix rows, so they need the incoming gradients beforehand: the
caller may announce them (``row_weights``). If what arrives in backward is the announced vector times one
number, the sums made in forward are scaled by it; otherwise the chunks are computed again. Both give the
same gradients; the second costs one more product.

Where ranks share the vocabulary each makes the logits of its own part. What a row needs from all of them
(its largest logit, its sum of exponentials, the logits asked for) is exchanged in two small collectives: per
chunk where gradients are made at once, else once for all rows. Gradients of weight and bias stay local; those
of the hidden rows are summed over the ranks once, for all rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bdtrain_kernels.masked_cross_entropy.gradients import GradientSums
from bdtrain_kernels.masked_cross_entropy.plan import Plan, Summary, accumulation_dtype, make_chunks


class CrossEntropy(torch.autograd.Function):
    """nll of rows; see ``masked_cross_entropy`` for the arguments, all validated there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        row_weights: Tensor | None,
        plan: Plan,
        with_gradient: bool,
    ) -> Tensor:
        """Nll [rows], and with ``row_weights`` the gradients of its weighted sum."""
        ids = targets.unsqueeze(1)
        announced = row_weights if with_gradient else None
        grads = None if announced is None else GradientSums(hidden, weight, bias, ctx.needs_input_grad)
        chunks = make_chunks(plan, hidden.shape[0], weight, bias)
        summary = Summary.empty(ids, accumulation_dtype(hidden))
        for chunk in plan.slices(hidden.shape[0]):
            state, local = chunks.summarise(hidden[chunk], ids[chunk])
            if grads is not None and announced is not None:
                whole = local.over_ranks(plan)
                factor = (local.peak - whole.peak).exp() / whole.total
                # d nll / d logits = probabilities - one-hot
                scores = chunks.score_gradients(
                    state, local.peak, factor, ids[chunk], factor.new_full((factor.shape[0], 1), -1.0)
                )
                grads.add(chunk, scores, announced[chunk])
                local = whole
            summary.put(chunk, local)
        if grads is None:
            summary = summary.over_ranks(plan)
        ctx.plan, ctx.one_pass = plan, grads is not None
        if with_gradient:
            made = (None, None, None) if grads is None else (grads.hidden, grads.weight, grads.bias)
            ctx.save_for_backward(
                hidden, weight, bias, targets, row_weights, summary.peak, summary.total, *made
            )
        return summary.total.log() - (summary.values.squeeze(1) - summary.peak)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias; autograd rounds the last two to the dtype they add up in."""
        hidden, weight, bias, targets, row_weights, peak, total, *made = ctx.saved_tensors
        plan: Plan = ctx.plan
        factor = _common_factor(grad, row_weights) if ctx.one_pass else None
        if factor is not None:
            grad_hidden, grad_weight, grad_bias = made
            grad_weight, grad_bias = (
                None if x is None else _scale(x, factor) for x in (grad_weight, grad_bias)
            )
        else:
            grads = GradientSums(hidden, weight, bias, ctx.needs_input_grad)
            chunks = make_chunks(plan, hidden.shape[0], weight, bias)
            for chunk in plan.slices(hidden.shape[0]):
                state = chunks.again(hidden[chunk], peak[chunk])
                inverse = total[chunk].reciprocal()
                scores = chunks.score_gradients(
                    state,
                    peak[chunk],
                    inverse,
                    targets[chunk].unsqueeze(1),
                    inverse.new_full((inverse.shape[0], 1), -1.0),
                )
                grads.add(chunk, scores, grad[chunk])
            grad_hidden, grad_weight, grad_bias = grads.hidden, grads.weight, grads.bias
        if grad_hidden is not None:
            grad_hidden = plan.sum_over_ranks((grad_hidden * grad.unsqueeze(1)).to(hidden.dtype))
        return grad_hidden, grad_weight, grad_bias, *([None] * 4)


class RowStatistics(torch.autograd.Function):
    """Logsumexp and some logits of rows; see ``row_statistics`` for the arguments, all validated there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        plan: Plan,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        """(logsumexp [rows], values [rows, ids])."""
        chunks = make_chunks(plan, hidden.shape[0], weight, bias)
        summary = Summary.empty(ids, accumulation_dtype(hidden))
        for chunk in plan.slices(hidden.shape[0]):
            summary.put(chunk, chunks.summarise(hidden[chunk], ids[chunk])[1])
        peak, total, values = summary.over_ranks(plan)
        ctx.plan = plan
        if with_gradient:
            ctx.save_for_backward(hidden, weight, bias, ids, peak, total)
        # A fresh tensor: a view of a collective's buffer may not leave as an output.
        return peak + total.log(), values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logsumexp: Tensor, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden, weight and bias; the chunks are computed again."""
        hidden, weight, bias, ids, peak, total = ctx.saved_tensors
        plan: Plan = ctx.plan
        grads = GradientSums(hidden, weight, bias, ctx.needs_input_grad)
        chunks = make_chunks(plan, hidden.shape[0], weight, bias)
        for chunk in plan.slices(hidden.shape[0]):
            state = chunks.again(hidden[chunk], peak[chunk])
            scores = chunks.score_gradients(
                state, peak[chunk], grad_logsumexp[chunk] / total[chunk], ids[chunk], grad_values[chunk]
            )
            grads.add(chunk, scores, None)
        grad_hidden = None if grads.hidden is None else plan.sum_over_ranks(grads.hidden)
        return grad_hidden, grads.weight, grads.bias, *([None] * 3)


def _common_factor(grad: Tensor, announced: Tensor) -> Tensor | None:
    """The number that ``announced`` must be multiplied with to give ``grad``, None when there is none.

    Waits for the device, once per backward: for the last answer.
    """
    if announced.numel() == 0:
        return grad.new_zeros(())
    announced = announced.to(grad.dtype)
    largest = announced.abs().argmax().unsqueeze(0)  # as a tensor: a plain index would be read on the host
    at_largest = announced.index_select(0, largest)
    # Where all are announced as 0, what arrives must be 0 too.
    factor = torch.where(at_largest == 0, 0.0, grad.index_select(0, largest) / at_largest)
    # A caller's (weights * nll).sum() / count rounds each product once or twice.
    tolerance = 4 * torch.finfo(grad.dtype).eps
    fits = torch.isclose(grad, announced * factor, rtol=tolerance, atol=0.0).all()
    return factor if bool(fits) else None


def _scale(x: Tensor, factor: Tensor) -> Tensor:
    """``x * factor``; in place where no second backward pass can ask for ``x`` again.

    At this point of a step all activations are alive: a copy of the weight's gradient in float32 would stand
    on top of its highest memory.
    """
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]
    factor = factor.to(x.dtype)
    return x * factor if keeps_graph else x.mul_(factor)
