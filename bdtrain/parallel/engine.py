"""DeepSpeed around the model: ZeRO, gradient reduction, clipping and the optimizer step.

Megatron's schedule owns forward and backward, DeepSpeed owns everything after. One ``with`` block of
``Engine.accumulate`` is one optimizer step: gradients of all its micro-batches add up locally and are reduced
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdtrain.model.transformer import TwoStreamTransformer
from bdtrain.parallel.cpu import schedule_device_context

AVERAGE_KEY = "ema"
"""Name under which an optimizer keeps the moving average of a parameter, beside its moments."""


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did.

    Attributes:
        applied: False when a gradient was not finite and the step was skipped on every rank.
        grad_norm: global gradient norm before clipping; infinite for a skipped step.
    """

    applied: bool
    grad_norm: float


def deepspeed_settings(
    *, micro_batch_size: int, data_parallel: int, zero_stage: int, grad_clip_norm: float
) -> dict[str, Any]:
    """DeepSpeed's JSON, made from ours; the user never writes one.

    Args:
        micro_batch_size: sequences per micro-batch.
        data_parallel: data-parallel ranks.
        zero_stage: 1 or 2.
        grad_clip_norm: largest global gradient norm, 0 for none.
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        # Micro-batches belong to Megatron's schedule: for DeepSpeed a step is one accumulation.
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro_batch_size * data_parallel,
        "gradient_clipping": grad_clip_norm,
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


class Engine:
    """A model with its optimizer under DeepSpeed.

    Args:
        model: the model of this rank.
        optimizer: a torch optimizer over its parameters.
        settings: from ``deepspeed_settings``.
        grid: the ``mpu`` object.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, settings: dict[str, Any], grid: Any
    ) -> None:
        import deepspeed

        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, mpu=grid, dist_init_required=False
        )
        self._client_optimizer = optimizer
        create_state = getattr(optimizer, "create_state", None)
        if create_state is not None:
            create_state()
        self._applied = False

    @property
    def module(self) -> TwoStreamTransformer:
        """The model."""
        module: TwoStreamTransformer = self._engine.module
        return module

    @property
    def skipped_steps(self) -> int:
        """Steps skipped because a gradient was not finite."""
        return int(self._engine.skipped_steps)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Forward and backward passes of one step go inside; gradients are reduced once, on the way out."""
        with self._engine.coalesce_grad_reduction():
            yield

    def step(self, *, lr: float) -> StepOutcome:
        """Clip, update and clear the gradients, unless one of them is not finite on any rank.

        Args:
            lr: learning rate of this update; a group's ``lr_scale`` multiplies it.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        skipped = self.skipped_steps
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        applied = self.skipped_steps == skipped
        self._applied |= applied
        return StepOutcome(applied=applied, grad_norm=float(norm))

    @contextmanager
    def averaged_weights(self) -> Iterator[bool]:
        """Put the moving average of the weights into the model for the time of the block.

        Yields:
            Whether there is an average: none is kept without ``optim.ema_decay``, nor before the first
            update.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        kept: list[tuple[nn.Parameter, Tensor]] = []
        try:
            if self._has_average():
                for parameter in self.module.parameters():
                    average = safe_get_full_optimizer_state(parameter, AVERAGE_KEY)
                    kept.append((parameter, parameter.data.clone()))
                    parameter.data.copy_(average.view_as(parameter))
            yield bool(kept)
        finally:
            for parameter, value in kept:
                parameter.data.copy_(value)

    def _has_average(self) -> bool:
        return self._applied and any(AVERAGE_KEY in state for state in self._client_optimizer.state.values())

    def close(self) -> None:
        """Release DeepSpeed's buffers and hooks."""
        self._engine.destroy()


def run_schedule(
    model: nn.Module,
    forward_step: Callable[
        [Iterator[Any], nn.Module], tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Any]]]
    ],
    micro_batches: Sequence[Any],
    *,
    rows: int,
    micro_batch_size: int,
    forward_only: bool,
) -> list[Any]:
    """Forward (and backward) of some micro-batches through Megatron's schedule.

    Args:
        model: this rank's model.
        forward_step: Megatron's forward step function: takes the iterator and the model, returns an output
            tensor and a function from it to (loss, token count, whatever is to be returned).
        micro_batches: what the iterator gives, one item per micro-batch.
        rows: length of the sequence axis between pipeline stages (streams times seq).
        micro_batch_size: sequences per micro-batch.
        forward_only: no backward pass.

    Returns:
        The third values of the loss function, one per micro-batch, on the last pipeline stage; empty
        elsewhere.
    """
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    with schedule_device_context():
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=[model],
            num_microbatches=len(micro_batches),
            seq_length=rows,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )
    return results
