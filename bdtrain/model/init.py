"""Initial weights from the seed and the parameter's global name: the same under every parallel layout.

Megatron's own initialisation repeats itself on each pipeline stage (every stage draws from the same generator
state) and depends on the order of construction. Here each parameter has a generator of its own, draws the
whole tensor of the serial model, and keeps its rank's part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bdtrain.model.config import BDTransformerConfig

if TYPE_CHECKING:
    from bdtrain.model.transformer import TwoStreamTransformer

RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")
"""Weights that write into the residual stream: their deviation falls with the number of layers."""


@torch.no_grad()
def initialise_parameters(model: TwoStreamTransformer, *, seed: int) -> None:
    """Overwrite every parameter of this rank's model.

    Args:
        model: this rank's part of the model.
        seed: of the run; the same on every rank.
    """
    config: BDTransformerConfig = model.config
    tp = model.pg_collection.tp
    for name, parameter in global_parameters(model):
        full = draw_parameter(name, full_shape(parameter, tp.size()), config, seed=seed)
        parameter.copy_(take_shard(full, parameter, tp.rank(), tp.size()))


def draw_parameter(name: str, shape: tuple[int, ...], config: BDTransformerConfig, *, seed: int) -> Tensor:
    """Initial value of one parameter of the serial model.

    Norm weights are 1, biases 0, everything else is normal with ``init_std``, divided by sqrt(2 * num_layers)
    for the weights that write into the residual stream.

    Args:
        name: global name.
        shape: of the whole tensor.
        config: of the model.
        seed: of the run.

    Returns:
        float32 [shape], whatever the type of the parameters.
    """
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if "layernorm" in name:
        return torch.ones(shape)
    deviation = config.init_std
    if name.endswith(RESIDUAL_OUTPUTS):
        deviation /= math.sqrt(2 * config.num_layers)
    digest = hashlib.sha256(f"bdtrain/init/1:{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, deviation, generator=generator)


def global_parameters(model: TwoStreamTransformer) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of this stage under the names they have in the serial model, in order."""
    layers = model.decoder.layers
    offset = layers[0].layer_number - 1 if len(layers) else 0
    for name, parameter in model.named_parameters():
        yield rename_layer(name, offset), parameter


def rename_layer(name: str, offset: int) -> str:
    """``decoder.layers.N.`` of a stage becomes ``decoder.layers.{N + offset}.`` of the whole model."""
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return name
    number, rest = name.removeprefix(prefix).split(".", 1)
    return f"{prefix}{int(number) + offset}.{rest}"


def full_shape(parameter: Tensor, tp_size: int) -> tuple[int, ...]:
    """Shape of the serial tensor of which a rank holds ``parameter``."""
    shape = list(parameter.shape)
    dim = partition_dim(parameter)
    if dim is not None:
        shape[dim] *= tp_size
    return tuple(shape)


def partition_dim(parameter: Tensor) -> int | None:
    """Dimension that tensor parallelism cuts, or None for a replicated parameter."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    return int(parameter.partition_dim)  # type: ignore[attr-defined]


def take_shard(full: Tensor, parameter: Tensor, rank: int, size: int) -> Tensor:
    """The part of ``full`` that a tensor-parallel rank holds.

    A parameter of stride n is n matrices stacked (gate and up of a SwiGLU), each cut by itself: rank r holds
    [gate_r; up_r]. The fused queries, keys and values lie by query group, so a plain cut keeps groups whole.

    Args:
        full: the serial tensor.
        parameter: carries Megatron's ``partition_dim`` and ``partition_stride``.
        rank: of the tensor-parallel group.
        size: of the group.
    """
    dim = partition_dim(parameter)
    if dim is None or size == 1:
        return full
    stride = int(getattr(parameter, "partition_stride", 1))
    pieces = [matrix.chunk(size, dim=dim)[rank] for matrix in full.chunk(stride, dim=dim)]
    return torch.cat(pieces, dim=dim)


def join_shards(shards: list[Tensor], parameter: Tensor) -> Tensor:
    """The serial tensor from the parts of all ranks, the inverse of ``take_shard``."""
    dim = partition_dim(parameter)
    if dim is None or len(shards) == 1:
        return shards[0]
    stride = int(getattr(parameter, "partition_stride", 1))
    pieces = [shard.chunk(stride, dim=dim) for shard in shards]
    return torch.cat([torch.cat([piece[i] for piece in pieces], dim=dim) for i in range(stride)], dim=dim)
