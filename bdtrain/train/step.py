"""The training step: from a batch of rows to an updated model. Start reading here.

1. Noise. The objective corrupts each micro-batch: which tokens are hidden, with which weight. The draw is a
   pure function of (seed, step, position of the row in the data), so every rank of a tensor- or
   pipeline-parallel group, and a resumed run, sees the same noise.
2. Count. All micro-batches of the step are taken first; the number of counted tokens is summed over the
   data-parallel ranks. The loss is the weighted sum of negative log-likelihoods over (copies x that count):
   it depends neither on the layout nor on the micro-batch, nor on which tokens happened to be masked.
3. Forward and backward through Megatron's schedule (no pipeline or 1F1B): noisy and clean streams side by
   side, one pass; only masked rows reach the head.
4. Reduction, completion of partial gradients, clipping and the update: ``parallel/engine.py``. A gradient
   that is not finite on one rank skips the step on all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bdtrain.data.loader import Batch, split_rows
from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.micro_batch import MicroBatch, corrupt_rows
from bdtrain.diffusion.objectives.base import Objective
from bdtrain.model.flops import count_pairs
from bdtrain.model.forward import forward_stage, stream_rows
from bdtrain.parallel.engine import Engine, run_schedule
from bdtrain.train.profiling import part


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank.

    Attributes:
        loss: weighted nats per counted token, the quantity that was minimised.
        masked_share: masked rows over (copies x counted tokens).
        counted_tokens: tokens of the global batch that count.
        masked_rows: rows that reached the head, over all copies.
        attention_pairs: useful pairs of query and key per head and full layer.
        last_attention_pairs: the same of the last layer, where the clean stream asks nothing.
        grad_norm: before clipping; infinite for a skipped step.
        applied: False for a step skipped because it was not finite.
        stop: whether any rank was asked to stop.
    """

    loss: float
    masked_share: float
    counted_tokens: int
    masked_rows: int
    attention_pairs: int
    last_attention_pairs: int
    grad_norm: float
    applied: bool
    stop: bool


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
    device: torch.device,
    stop: bool = False,
    spoil: bool = False,
) -> StepResult:
    """Train on this rank's rows of one global batch.

    Args:
        engine: the model with its optimizer; updated.
        objective: what is minimised.
        batch: this rank's rows of the global batch, tokens [rows, seq]; the same on all tp and pp ranks.
        seed: seed of the run.
        step: batches taken before this one, skipped steps included; keys the noise.
        lr: learning rate of the update.
        global_batch_size: rows of the global batch.
        micro_batch_size: rows of a micro-batch.
        noise_copies: noisy copies of each row.
        device: where the model is.
        stop: this rank was asked to stop; told to all with the counts.
        spoil: make this rank's loss not finite; for tests of what a run survives.
    """
    # 1. noise
    key = NoiseKey(seed=seed, purpose=Purpose.TRAIN, step=step)
    with part("noise"):
        micro_batches = [
            corrupt_rows(
                objective,
                rows,
                key=key,
                global_batch_size=global_batch_size,
                copies=noise_copies,
                device=device,
            )
            for rows in split_rows(batch, micro_batch_size)
        ]

    # 2. one count for the whole step
    groups = engine.module.pg_collection
    with part("count"):
        counted, masked, pairs, last_pairs, stops = _count(micro_batches, stop, groups)
    denominator = max(counted * noise_copies, 1)
    # DeepSpeed takes the mean over data-parallel ranks; the factor undoes it.
    scale = math.nan if spoil else groups.dp.size() / denominator

    # 3. forward and backward
    # Megatron marks its part of it, forward-backward; what follows in the range is the reduction.
    with part("gradients and reduction"), engine.accumulate() as after_backward:
        sums = run_schedule(
            engine.module,
            make_forward_step(objective, scale=scale),
            micro_batches,
            rows=stream_rows(micro_batches[0]),
            micro_batch_size=micro_batch_size,
            forward_only=False,
            after_backward=after_backward,
        )
    # Earlier pipeline stages have no loss and add nothing; tensor-parallel ranks all have the same one.
    loss = torch.stack(sums).sum().double() if sums else torch.zeros((), dtype=torch.float64, device=device)
    dist.all_reduce(loss)

    # 4. update
    with part("update"):
        outcome = engine.step(lr=lr)
    return StepResult(
        loss=float(loss) / groups.tp.size() / denominator,
        masked_share=masked / denominator,
        counted_tokens=counted,
        masked_rows=masked,
        attention_pairs=pairs,
        last_attention_pairs=last_pairs,
        grad_norm=outcome.grad_norm,
        applied=outcome.applied,
        stop=stops > 0,
    )


def _count(micro_batches: Sequence[MicroBatch], stop: bool, groups: Any) -> tuple[int, int, int, int, int]:
    """Sums over the whole step and all ranks, in one collective and one wait for the device.

    Returns:
        Counted tokens, masked rows, useful attention pairs of a full and of the last layer, and how many
        ranks were asked to stop.
    """
    device = micro_batches[0].corrupted.rows.device
    sums = torch.zeros(5, dtype=torch.int64, device=device)
    for micro_batch in micro_batches:
        corrupted = micro_batch.corrupted
        copies = 0 if corrupted.noisy is None else corrupted.noisy.shape[1]
        clean = corrupted.clean is not None
        sums[0] += corrupted.counted.sum()
        sums[1] += corrupted.rows.sum()
        for place, queries in ((2, "all"), (3, "noisy" if copies and clean else "all")):
            sums[place] += count_pairs(micro_batch.layout, noisy_copies=copies, clean=clean, queries=queries)
    # Every tp and pp peer counts the same rows; only the wish to stop is each rank's own.
    peers = dist.get_world_size() // groups.dp.size()
    sums[4] = peers * int(stop)
    dist.all_reduce(sums)
    totals = (sums // peers).tolist()
    return totals[0], totals[1], totals[2], totals[3], totals[4]


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
        output = forward_stage(model, objective, next(micro_batches))
        # On the last stage the losses of the rows; on earlier ones hidden states, which nothing reduces.
        total = output.sum() if model.post_process else output

        def reduce(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            # Megatron divides by nothing: the normaliser is already in the scale.
            tokens = torch.zeros((), dtype=torch.int, device=output.device)
            return output * scale, tokens, output.detach()

        return total, reduce

    return forward_step
