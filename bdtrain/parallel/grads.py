"""Gradients of parameters that every tensor-parallel rank holds but only partly computes.

A weight of the norm of queries and keys sees this rank's heads only; under sequence parallelism the other
norms and the biases behind row-parallel projections see this rank's rows only. The model marks such
parameters (``bdtrain.model``); their gradients are summed over the tensor-parallel group once per step, on
the part that the rank owns after reduction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from bdtrain.model.gradients import PARTIAL

if TYPE_CHECKING:
    from bdtrain.parallel.zero import ZeroState


@torch.no_grad()
def complete_partial_gradients(state: ZeroState, tp_group: dist.ProcessGroup) -> None:
    """Sum the marked gradients over the tensor-parallel group, in one collective.

    All ranks of the group own the same stretches of these parameters, since their parts of the model have
    the same shapes in the same order. In a group of one the sum is the gradient itself, bit for bit.

    Args:
        state: of the optimizer, after reduction.
        tp_group: ranks that share each layer.
    """
    gradients = [g for parameter, g in state.gradient_parts() if getattr(parameter, PARTIAL, False)]
    if not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=tp_group)
    for gradient, whole in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(whole.view_as(gradient))
