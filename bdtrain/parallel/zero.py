"""What ZeRO did with parameters, gradients and optimizer state: the one reader of DeepSpeed's structures.

Stages 1 and 2 lay the parameters of a group end to end and give each data-parallel rank one stretch of the
whole; stage 3 gives each rank a stretch of every parameter. Both are told as ``StateFragment``s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bdtrain.model.init import full_shape, global_parameters, partition_dim
from bdtrain.parallel.fragments import MASTER, StateFragment

if TYPE_CHECKING:
    from bdtrain.model.transformer import TwoStreamTransformer


@dataclass(frozen=True)
class _Parameter:
    """A parameter as the model made it, before ZeRO took its data."""

    name: str
    parameter: nn.Parameter
    full_shape: tuple[int, ...]
    partition_dim: int | None
    partition_stride: int


@dataclass(frozen=True)
class _Part:
    """The stretch of a parameter that this rank owns.

    Attributes:
        described: the parameter.
        start: first element in the flattened parameter of this rank.
        count: elements.
        master: the flat float32 tensor that holds the stretch; the optimizer's state is keyed by it.
        offset: where in ``master`` it lies.
    """

    described: _Parameter
    start: int
    count: int
    master: Tensor
    offset: int


class ZeroState:
    """Parameters, reduced gradients and optimizer state of one rank; see ``zero_state``."""

    def __init__(self, model: TwoStreamTransformer) -> None:
        """Describe the parameters; before ``deepspeed.initialize``, since stage 3 empties them."""
        tp = model.pg_collection.tp
        self._tp_rank, self._tp_size = tp.rank(), tp.size()
        self._described = {
            id(parameter): _Parameter(
                name=name,
                parameter=parameter,
                full_shape=full_shape(parameter, tp.size()),
                partition_dim=partition_dim(parameter),
                partition_stride=int(getattr(parameter, "partition_stride", 1)),
            )
            for name, parameter in global_parameters(model)
        }
        self._optimizer: Any = None
        self._client: Any = None

    def attach(self, optimizer: Any, client: torch.optim.Optimizer) -> ZeroState:
        """Take DeepSpeed's optimizer and ours inside it."""
        self._optimizer, self._client = optimizer, client
        return self

    def masters(self) -> list[Tensor]:
        """The flat float32 tensors that this rank's optimizer updates."""
        raise NotImplementedError

    def parts(self) -> Iterator[_Part]:
        """Stretches that this rank owns, in the optimizer's order."""
        raise NotImplementedError

    def gradient_parts(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Reduced gradients of those stretches, after accumulation and before the step."""
        raise NotImplementedError

    def publish_masters(self) -> None:
        """Copy the masters into the weights that the model computes with, on all ranks."""
        raise NotImplementedError

    def fragments(self) -> list[StateFragment]:
        """Master weights and optimizer state of each stretch, as live views."""
        fragments = []
        for part in self.parts():
            tensors = {MASTER: part.master}
            for kind, value in self._client.state[part.master].items():
                if torch.is_tensor(value) and value.shape == part.master.shape:
                    tensors[kind] = value
            described = part.described
            fragments.append(
                StateFragment(
                    name=described.name,
                    full_shape=described.full_shape,
                    partition_dim=described.partition_dim,
                    partition_stride=described.partition_stride,
                    tp_rank=self._tp_rank,
                    tp_size=self._tp_size,
                    start=part.start,
                    count=part.count,
                    tensors={
                        kind: tensor.detach().narrow(0, part.offset, part.count)
                        for kind, tensor in tensors.items()
                    },
                )
            )
        return fragments

    def reduced_gradients(self) -> dict[str, Tensor]:
        """Global name to this rank's stretch of the reduced gradient, flat."""
        return {
            self._described[id(parameter)].name: gradient.reshape(-1)
            for parameter, gradient in self.gradient_parts()
        }

    def begin_accumulation(self) -> None:
        """Micro-batches follow, each reduced at its own end."""
        # Not "the boundary": a reduction adds to what is there, and the step is prepared at the end.
        self._optimizer.set_gradient_accumulation_boundary(False)

    def end_of_backward(self) -> None:
        """Reduce what the buckets still hold; DeepSpeed's hooks began during the backward pass."""
        self._optimizer.overlapping_partition_gradients_reduce_epilogue()
        # Its own count of micro-batches moves in ``DeepSpeedEngine.forward``, which the schedule passes by.
        self._optimizer.micro_step_id += 1

    def end_accumulation(self) -> None:
        """The last micro-batch is reduced: hand the sum to the step."""
        self._optimizer.finalize_gradient_accumulation_boundary()


class _FlatGroups(ZeroState):
    """Stages 1 and 2."""

    def __init__(self, model: TwoStreamTransformer) -> None:
        super().__init__(model)
        self._pp_group = model.pg_collection.pp

    def attach(self, optimizer: Any, client: torch.optim.Optimizer) -> ZeroState:
        # DeepSpeed sums the gradient norm over tp and pp once per group of parameters. Pipeline stages may
        # have different groups (a rule of ``optim.groups`` that only the embedding meets): a stage with fewer
        # takes part in the others' sums with nothing of its own, or its peers wait for ever.
        groups = torch.tensor(len(optimizer.bit16_groups), device=optimizer.device)
        dist.all_reduce(groups, op=dist.ReduceOp.MAX, group=self._pp_group)
        most = int(groups)

        def scaled_global_norm(norm_type: float = 2) -> Tensor:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            none: list[Any] = [[]] * (most - len(optimizer.bit16_groups))
            gradients = [optimizer.averaged_gradients[i] for i in range(len(optimizer.bit16_groups))] + none
            parameters = [*optimizer.params_in_partition, *none]
            norms = map(optimizer.get_grad_norm_direct, gradients, parameters)
            return combine_grad_norm_groups(norms, norm_type=norm_type)

        optimizer.scaled_global_norm = scaled_global_norm
        return super().attach(optimizer, client)

    def masters(self) -> list[Tensor]:
        return list(self._optimizer.single_partition_of_fp32_groups)

    def parts(self) -> Iterator[_Part]:
        groups = zip(self._optimizer.bit16_groups, self.masters(), strict=True)
        for parameters, master in groups:
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is None:
                    continue  # another rank's
                yield _Part(
                    described=self._described[id(parameter)],
                    start=mapping.lp_fragment_address.start,
                    count=mapping.lp_fragment_address.numel,
                    master=master,
                    offset=mapping.hp_fragment_address.start,
                )

    def gradient_parts(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for parameters in self._optimizer.bit16_groups:
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    yield parameter, mapping.get_lp_grad_fragment(parameter._index_in_param_group)

    def publish_masters(self) -> None:
        self._optimizer.update_lp_params()


class _ShardedParameters(ZeroState):
    """Stage 3."""

    def masters(self) -> list[Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def parts(self) -> Iterator[_Part]:
        masters = self.masters()
        for parameters in self._optimizer.fp16_groups:
            for parameter in parameters:
                group, offset, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
                size = parameter.partition_numel()
                start = dist.get_rank(parameter.ds_process_group) * size
                # The last rank's stretch is filled up with zeros beyond the parameter's end.
                count = min(size, parameter.ds_numel - start)
                if count > 0:
                    yield _Part(
                        described=self._described[id(parameter)],
                        start=start,
                        count=count,
                        master=masters[group],
                        offset=int(offset),
                    )

    def gradient_parts(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for number, parameters in enumerate(self._optimizer.fp16_groups):
            yield from zip(parameters, self._optimizer.averaged_gradients[number], strict=True)

    def publish_masters(self) -> None:
        optimizer = self._optimizer
        optimizer._partition_all_parameters()
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Whole parameters for the time of a block, where stage 3 has split them over data-parallel ranks.

    Args:
        parameters: to be read, not changed. Every data-parallel rank must call it with the same ones.
    """
    split = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not split:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(split):
        yield


def zero_state(model: TwoStreamTransformer, *, stage: int) -> ZeroState:
    """Describe a model's parameters, to be attached to DeepSpeed's optimizer when it is there.

    Args:
        model: this rank's part, not yet given to DeepSpeed.
        stage: 1, 2 or 3.
    """
    return _ShardedParameters(model) if stage == 3 else _FlatGroups(model)
