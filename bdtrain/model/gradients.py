"""What must be known of the parameters' gradients: which are partial, and in which type they add up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from bdtrain.model.init import partition_dim

if TYPE_CHECKING:
    from bdtrain.model.transformer import TwoStreamTransformer

PARTIAL = "partial_gradient"
"""Mark of a parameter that each tensor-parallel rank holds whole but has only its part of the gradient of."""


def mark_partial_gradients(model: TwoStreamTransformer) -> None:
    """Set ``partial_gradient = True`` on the parameters whose gradients the ranks of ``tp`` must sum.

    The norms of queries and keys meet this rank's heads only. Under sequence parallelism the norms of a layer
    and the bias added behind a row-parallel projection meet this rank's rows only. Nothing else is partial:
    the final norm and the head work on gathered rows, and the embedding's gradient is gathered.

    The marks do not depend on the number of ranks: one rank's part is the whole gradient, and so is its sum.
    """
    for layer in model.decoder.layers:
        attention = layer.self_attention
        modules = [attention.q_layernorm, attention.k_layernorm]
        parameters = [p for module in modules if module is not None for p in module.parameters()]
        if model.config.sequence_parallel:
            parameters += [*layer.input_layernorm.parameters(), *layer.pre_mlp_layernorm.parameters()]
            biases = (attention.linear_proj.bias, layer.mlp.linear_fc2.bias)
            parameters += [bias for bias in biases if bias is not None]
        for parameter in parameters:
            setattr(parameter, PARTIAL, True)


def partial_gradient_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The marked parameters, in the model's order: the same on every tensor-parallel rank.

    Between the last backward pass of a step and anything that reads gradients, the gradient of each must be
    summed over the tensor-parallel group, once.
    """
    return [parameter for parameter in model.parameters() if getattr(parameter, PARTIAL, False)]


def accumulate_in_float32(model: nn.Module) -> None:
    """Let the gradients of 16-bit parameters add up in float32.

    Each micro-batch's gradient then has at most the rounding of its own computation; in bfloat16 the sum
    itself would stop growing after some hundred equal terms.
    """
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.grad_dtype = torch.float32


def check_marks(model: TwoStreamTransformer) -> None:
    """Assert that each parameter says what it is: gradient norms, shards and sums depend on it."""
    for name, parameter in model.named_parameters():
        split = partition_dim(parameter) is not None
        assert split or getattr(parameter, "partition_dim", -1) < 0, f"{name} is split but not marked"
        if model.config.sequence_parallel and name.startswith("decoder."):
            assert split or getattr(parameter, PARTIAL, False), (
                f"{name} sees some rows only, but is not marked"
            )
