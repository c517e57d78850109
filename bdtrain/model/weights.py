"""The model's weights under the names and shapes of the serial model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from bdtrain.errors import CheckpointError
from bdtrain.model.init import full_shape, global_parameters, join_shards, partition_dim, take_shard

if TYPE_CHECKING:
    from bdtrain.model.transformer import TwoStreamTransformer


@torch.no_grad()
def full_state(model: TwoStreamTransformer) -> dict[str, Tensor]:
    """Weights of this pipeline stage, whole: copies, on the model's device.

    Names are the parameters' own with global layer numbers. Every rank of the tensor-parallel group must call
    it.
    """
    group = model.pg_collection.tp
    state = {}
    for name, parameter in global_parameters(model):
        if partition_dim(parameter) is None or group.size() == 1:
            state[name] = parameter.detach().clone()
            continue
        # Gathering flat keeps the ranks' parts apart; joining them knows about stacked matrices.
        flat = gather_from_tensor_model_parallel_region(parameter.detach().reshape(1, -1), group=group)
        shards = [part.view(parameter.shape) for part in flat.chunk(group.size(), dim=1)]
        state[name] = join_shards(shards, parameter)
    return state


@torch.no_grad()
def load_full_state(model: TwoStreamTransformer, state: Mapping[str, Tensor]) -> None:
    """Put whole weights into this rank's model.

    Args:
        model: this rank's part of the model; a pipeline stage takes its own layers.
        state: by the names of ``full_state``. On a model that is not split over stages no other name may be
            there.

    Raises:
        CheckpointError: if a weight is missing, unknown or of another shape; nothing is loaded then.
    """
    group = model.pg_collection.tp
    parameters = dict(global_parameters(model))
    problems = [f"missing: {name}" for name in parameters if name not in state]
    if model.pre_process and model.post_process:
        problems += [f"unknown: {name}" for name in state if name not in parameters]
    for name, parameter in parameters.items():
        wanted = full_shape(parameter, group.size())
        if name in state and tuple(state[name].shape) != wanted:
            problems.append(f"{name} has shape {tuple(state[name].shape)}, the model's is {wanted}")
    if problems:
        shown = problems[:12] + ([f"and {len(problems) - 12} more"] if len(problems) > 12 else [])
        raise CheckpointError(
            "these weights are not this model's; check model.shape and the sizes in the configuration:\n  "
            + "\n  ".join(shown)
        )
    for name, parameter in parameters.items():
        parameter.copy_(take_shard(state[name], parameter, group.rank(), group.size()))
