"""Which part of which parameter a rank owns, whatever layout and ZeRO stage the run has."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MASTER = "master"
"""Kind of the float32 weights that the optimizer updates."""


@dataclass(frozen=True)
class StateFragment:
    """A contiguous stretch of one parameter with its optimizer state, as live views.

    Every element of every parameter belongs to exactly one data-parallel rank of each tensor-parallel rank.
    Parameters that tensor parallelism does not cut are the same on all tensor-parallel ranks.

    Attributes:
        name: global name, that of the serial model.
        full_shape: shape of the serial tensor.
        partition_dim: dimension that tensor parallelism cuts; None for a replicated parameter.
        partition_stride: matrices stacked along that dimension, each cut by itself.
        tp_rank: tensor-parallel rank that holds it.
        tp_size: tensor-parallel ranks.
        start: first element, in this rank's flattened (row-major) part of the parameter.
        count: elements.
        tensors: kind ("master", "exp_avg", "exp_avg_sq", "ema") to a float32 view, [count].
    """

    name: str
    full_shape: tuple[int, ...]
    partition_dim: int | None
    partition_stride: int
    tp_rank: int
    tp_size: int
    start: int
    count: int
    tensors: dict[str, Tensor]
