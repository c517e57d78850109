"""The whole model on one pipeline stage, for generation: its cache is not split over stages."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bdtrain.model.init import global_parameters
from bdtrain.model.transformer import TwoStreamTransformer
from bdtrain.parallel.zero import gathered


class _Alone:
    """Stands for a group of one where only rank and size are asked: making a real one takes every rank."""

    @staticmethod
    def rank() -> int:
        return 0

    @staticmethod
    def size() -> int:
        return 1


@torch.no_grad()
def whole_model(model: TwoStreamTransformer) -> TwoStreamTransformer | None:
    """A model that can generate, from the stages' weights as they are now. Every rank must call it.

    Tensor parallelism stays: each rank of the first stage holds its part of every layer.

    Args:
        model: this rank's stage.

    Returns:
        The model itself where it can generate as it is: one stage, without sequence parallelism (its blocks
        of a few tokens cannot be split). Else a copy with all layers on the first stage, None on the others.
    """
    groups = model.pg_collection
    if groups.pp.size() == 1 and not model.config.sequence_parallel:
        return model
    with gathered(model.parameters()):
        mine = dict(global_parameters(model))
        shapes: list[Any] = [None] * groups.pp.size()
        dist.all_gather_object(shapes, [(name, tuple(p.shape)) for name, p in mine.items()], group=groups.pp)
        first = groups.pp.rank() == 0
        whole = _build_whole(model) if first else None
        targets = {} if whole is None else dict(global_parameters(whole))
        for source, listed in zip(dist.get_process_group_ranks(groups.pp), shapes, strict=True):
            for name, shape in listed:
                parameter = mine.get(name) if source == dist.get_rank() else None
                value: Tensor = (
                    torch.empty(shape, dtype=model.config.params_dtype, device=_device(model))
                    if parameter is None
                    else parameter.detach()
                )
                dist.broadcast(value, src=source, group=groups.pp)
                if first:
                    targets[name].copy_(value)
    return whole


def _build_whole(model: TwoStreamTransformer) -> TwoStreamTransformer:
    config = dataclasses.replace(
        model.config, pipeline_model_parallel_size=1, pipeline_dtype=None, sequence_parallel=False
    )
    groups: Any = type(model.pg_collection)()
    for name, group in vars(model.pg_collection).items():
        setattr(groups, name, group)
    groups.pp = _Alone()
    return TwoStreamTransformer(config, pg_collection=groups).to(_device(model)).eval()


def _device(model: TwoStreamTransformer) -> torch.device:
    return next(model.parameters()).device
