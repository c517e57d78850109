"""DeepSpeed around the model: ZeRO, gradient reduction, clipping and the optimizer step.

Megatron's schedule owns forward and backward, DeepSpeed owns everything after. One ``with`` block of
``Engine.accumulate`` is one optimizer step. What the three stages do with its micro-batches:

stage  during the micro-batches                             bytes per parameter of a rank (bf16 / fp32)
1      gradients add up locally in float32, one reduction   2 + 4 + 16/dp   /   4 + 4 + 16/dp
2      each micro-batch is reduced into the rank's part     2 + 20/dp       /   4 + 20/dp
3      as 2, and weights are gathered layer by layer        22/dp           /   24/dp

(16/dp: master weights, two moments, average; all float32. The step itself needs up to 8/dp more, for the
reduced gradient or its copy and AdamW's denominators; evaluation of averaged weights 4/dp.) Stage 1
communicates once per step, stages 2 and 3 once per micro-batch: with many micro-batches stage 1 is the faster
one, and with tp and pp its gradients are small already. Nothing overlaps with the backward pass: stage 1
reduces after it, stages 2 and 3 in its hooks, on the same stream.

Both stages 1 and 2 are DeepSpeed's stage 2 optimizer, under ``coalesce_grad_reduction`` or not. DeepSpeed's
own stage 1 turns into another class for bf16 weights, which keeps a bf16 gradient beside the float32 one and
refuses to coalesce; here PyTorch itself adds bf16 gradients into a float32 ``.grad`` (``grad_dtype``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bdtrain.errors import BdtrainError, DataError, RankError
from bdtrain.model.transformer import TwoStreamTransformer
from bdtrain.parallel.cpu import schedule_device_context
from bdtrain.parallel.fragments import StateFragment
from bdtrain.parallel.grads import complete_partial_gradients
from bdtrain.parallel.zero import ZeroState, zero_state

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
    *,
    micro_batch_size: int,
    data_parallel: int,
    zero_stage: int,
    grad_clip_norm: float,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """DeepSpeed's JSON, made from ours; the user never writes one.

    Args:
        micro_batch_size: sequences per micro-batch.
        data_parallel: data-parallel ranks.
        zero_stage: 1, 2 or 3.
        grad_clip_norm: largest global gradient norm, 0 for none.
        dtype: of the weights that the model computes with.
    """
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        # Micro-batches belong to Megatron's schedule: for DeepSpeed a step is one accumulation.
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro_batch_size * data_parallel,
        "gradient_clipping": grad_clip_norm,
        "zero_optimization": {
            # The module's docstring says why stage 1 is not DeepSpeed's.
            "stage": max(zero_stage, 2),
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            # The contiguous buffer has the type of the weights: it would round float32 gradients to bf16.
            "contiguous_gradients": False,
            "overlap_comm": False,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True}
    return settings


class Engine:
    """A model with its optimizer under DeepSpeed.

    Args:
        model: the model of this rank.
        optimizer: a torch optimizer over its parameters.
        settings: from ``deepspeed_settings``.
        grid: the ``mpu`` object.
        zero_stage: 1, 2 or 3; the module's docstring says what each does.
    """

    def __init__(
        self,
        model: TwoStreamTransformer,
        optimizer: torch.optim.Optimizer,
        *,
        settings: dict[str, Any],
        grid: Any,
        zero_stage: int = 1,
    ) -> None:
        import deepspeed

        self._zero_stage = zero_stage
        self._client_optimizer = optimizer
        groups = model.pg_collection
        self._tp_group = groups.tp
        self._ranks = groups.tp.size() * groups.pp.size() * groups.dp.size()
        zero_description = zero_state(model, stage=zero_stage)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, mpu=grid, dist_init_required=False
        )
        self._state: ZeroState = zero_description.attach(self._engine.optimizer, optimizer)
        create_state = getattr(optimizer, "create_state", None)
        if create_state is not None:
            create_state(self._state.masters())
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
    def accumulate(self) -> Iterator[Callable[[], None] | None]:
        """Forward and backward passes of one step go inside; afterwards gradients are reduced and complete.

        Yields:
            What is to be called at the end of each micro-batch's backward pass, if anything; ``run_schedule``
            takes it.
        """
        if self._zero_stage == 1:
            with self._engine.coalesce_grad_reduction():
                try:
                    yield None
                except BaseException:
                    # The context reduces what it finds on every way out; peers would not be there for it.
                    for parameter in self.module.parameters():
                        parameter.grad = None
                    raise
        else:
            self._state.begin_accumulation()
            yield self._state.end_of_backward
            self._state.end_accumulation()
        complete_partial_gradients(self._state, self._tp_group)

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

    def reduced_gradients(self) -> dict[str, Tensor]:
        """This rank's part of each gradient, between ``accumulate`` and ``step``; for tests.

        Returns:
            Global name to a float32 view of the elements that the fragment of that name owns.
        """
        return self._state.reduced_gradients()

    def fragments(self) -> list[StateFragment]:
        """Master weights and optimizer state that this rank owns, as live views."""
        return self._state.fragments()

    def adopt_state(self, *, adam_step: int) -> None:
        """Use what was written into ``fragments``: the weights that the model computes with follow.

        Args:
            adam_step: updates applied so far. Every rank must call it.
        """
        for state in self._client_optimizer.state.values():
            state["step"].fill_(float(adam_step))
        self._applied = adam_step > 0
        self._state.publish_masters()

    @contextmanager
    def averaged_weights(self) -> Iterator[bool]:
        """Put the moving average of the weights into the model for the time of the block.

        Yields:
            Whether there is an average: none is kept without ``optim.ema_decay``, nor before the first
            update.

        Raises:
            BaseException: what the block raises. The weights are given back first if that is an error of ours
                which all ranks meet, or there is one rank; otherwise they are not, and the run must end.
        """
        masters = self._state.masters()
        averaged = self._applied and any(AVERAGE_KEY in self._client_optimizer.state[m] for m in masters)
        if not averaged:
            yield False
            return
        kept = [master.detach().clone() for master in masters]
        self._set_masters([self._client_optimizer.state[master][AVERAGE_KEY] for master in masters])
        try:
            yield True
        except BaseException as error:
            # To publish weights is a collective. With an error that one rank met alone (``DataError``: its
            # disk refused) the peers are in another one.
            alone = not isinstance(error, BdtrainError) or isinstance(error, (DataError, RankError))
            if self._ranks == 1 or not alone:
                self._set_masters(kept)
            raise
        self._set_masters(kept)

    def _set_masters(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for master, value in zip(self._state.masters(), values, strict=True):
                master.copy_(value)
        self._state.publish_masters()

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
    after_backward: Callable[[], None] | None = None,
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
        after_backward: called when the backward pass of a micro-batch is complete.

    Returns:
        The third values of the loss function, one per micro-batch, on the last pipeline stage; empty
        elsewhere.
    """
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    def watched(batches: Iterator[Any], module: nn.Module) -> Any:
        output, reduce = forward_step(batches, module)
        if after_backward is not None and output.requires_grad:
            output.register_hook(lambda _: _queue(after_backward))
        return output, reduce

    with schedule_device_context():
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=watched,
            data_iterator=iter(micro_batches),
            model=[model],
            num_microbatches=len(micro_batches),
            seq_length=rows,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )
    return results


def _queue(callback: Callable[[], None]) -> None:
    """Call at the end of the running backward pass, recomputed parts included."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]
