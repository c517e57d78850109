"""The training step: from a batch of rows to an updated model. Start reading here.

1. Noise. The objective corrupts each micro-batch: which tokens are hidden, with which weight. The draw is a
   pure function of (seed, step, position of the row in the data), so every rank of a tensor- or
   pipeline-parallel group, and a resumed run, sees the same noise.
2. Count. All micro-batches of the step are taken first; the number of counted tokens is summed over the
   data-parallel ranks. The loss is the weighted sum of negative log-likelihoods over (copies x that count):
   it depends neither on the layout nor on the micro-batch, nor on which tokens happened to be masked.
3. Forward and backward through Megatron's schedule: noisy and clean streams side by side, one pass; only
   masked rows reach the head.
4. Reduction, clipping and the update by DeepSpeed. A gradient that is not finite on one rank skips the step
on all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bdtrain.data.loader import Batch
from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.objectives.base import Objective
from bdtrain.model.forward import MicroBatch, corrupt_rows, forward_losses, stream_rows
from bdtrain.parallel.engine import Engine, run_schedule


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank.

    Attributes:
        loss: weighted nats per counted token, the quantity that was minimised.
        masked_share: masked rows over (copies x counted tokens).
        counted_tokens: tokens of the global batch that count.
        grad_norm: before clipping; infinite for a skipped step.
        applied: False for a step skipped because it was not finite.
    """

    loss: float
    masked_share: float
    counted_tokens: int
    grad_norm: float
    applied: bool


def train_step(
    engine: Engine,
    objective: Objective,
    batch: Batch,
    *,
    seed: int,
    step: int,
    lr: float,
    global_batch_size: int,
    micro_batch_size: int,
    noise_copies: int,
    data_parallel_group: dist.ProcessGroup,
    device: torch.device,
) -> StepResult:
    """Train on this rank's rows of one global batch.

    Args:
        engine: the model with its optimizer; updated.
        objective: what is minimised.
        batch: this rank's rows of the global batch, tokens [rows, seq].
        seed: seed of the run.
        step: batches taken before this one, skipped steps included; keys the noise.
        lr: learning rate of the update.
        global_batch_size: rows of the global batch.
        micro_batch_size: rows of a micro-batch.
        noise_copies: noisy copies of each row.
        data_parallel_group: ranks with other rows of the same batch.
        device: where the model is.
    """
    # 1. noise
    key = NoiseKey(seed=seed, purpose=Purpose.TRAIN, step=step)
    micro_batches = [
        corrupt_rows(
            objective, rows, key=key, global_batch_size=global_batch_size, copies=noise_copies, device=device
        )
        for rows in split_rows(batch, micro_batch_size)
    ]

    # 2. one count for the whole step
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    for micro_batch in micro_batches:
        counts[0] += micro_batch.corrupted.counted.sum()
        counts[1] += micro_batch.corrupted.rows.sum()
    dist.all_reduce(counts, group=data_parallel_group)
    counted, masked = counts.tolist()  # one wait for the device
    denominator = max(counted * noise_copies, 1)
    # DeepSpeed takes the mean over data-parallel ranks; the factor undoes it.
    scale = dist.get_world_size(data_parallel_group) / denominator

    # 3. forward and backward
    with engine.accumulate():
        sums = run_schedule(
            engine.module,
            make_forward_step(objective, scale=scale),
            micro_batches,
            rows=stream_rows(micro_batches[0]),
            micro_batch_size=micro_batch_size,
            forward_only=False,
        )
    loss = torch.stack(sums).sum() if sums else torch.zeros((), device=device)
    dist.all_reduce(loss, group=data_parallel_group)

    # 4. update
    outcome = engine.step(lr=lr)
    return StepResult(
        loss=float(loss) / denominator,
        masked_share=masked / denominator,
        counted_tokens=counted,
        grad_norm=outcome.grad_norm,
        applied=outcome.applied,
    )


def split_rows(batch: Batch, micro_batch_size: int) -> list[Batch]:
    """Cut a batch into micro-batches of ``micro_batch_size`` rows; the last one may be smaller."""
    fields = ("tokens", "documents", "counted", "sample_index", "batch_index")
    starts = range(0, batch.tokens.shape[0], micro_batch_size)
    return [Batch(**{f: getattr(batch, f)[s : s + micro_batch_size] for f in fields}) for s in starts]


def make_forward_step(
    objective: Objective, *, scale: float
) -> Callable[[Iterator[MicroBatch], nn.Module], tuple[Tensor, Callable[[Tensor], Any]]]:
    """Megatron's forward-step function for an objective.

    Args:
        objective: computes losses from logits.
        scale: what the sum of weighted losses is multiplied by before the backward pass.
    """

    def forward_step(
        micro_batches: Iterator[MicroBatch], model: nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        micro_batch = next(micro_batches)
        losses = forward_losses(model, objective, micro_batch)
        total = losses.sum()

        def reduce(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            # Megatron divides by nothing: the normaliser is already in the scale.
            tokens = torch.zeros((), dtype=torch.int, device=output.device)
            return output * scale, tokens, total.detach()

        return total, reduce

    return forward_step
