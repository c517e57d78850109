"""From a corrupted micro-batch to the loss of each row that has one: common to training and evaluation."""

from __future__ import annotations

from torch import Tensor, nn

from bdtrain.diffusion.micro_batch import MicroBatch
from bdtrain.diffusion.objectives.base import Objective
from bdtrain.errors import ShapeError
from bdtrain.model.transformer import assemble_streams


def stream_rows(micro_batch: MicroBatch) -> int:
    """Length of the sequence axis of the model's input: streams times seq."""
    corrupted = micro_batch.corrupted
    seq = micro_batch.layout.shape[1]
    noisy = 0 if corrupted.noisy is None else corrupted.noisy.shape[1]
    return (noisy + (corrupted.clean is not None)) * seq


def forward_losses(model: nn.Module, objective: Objective, micro_batch: MicroBatch) -> Tensor:
    """Weighted loss of every row that needs one.

    Args:
        model: the two-stream transformer, or its last pipeline stage.
        objective: computes losses from logits.
        micro_batch: from ``corrupt_rows``.

    Returns:
        Weighted nats, float32 [selected], in row-major order of ``corrupted.rows``.

    Raises:
        ShapeError: on a pipeline stage without a head.
    """
    if not getattr(model, "post_process", True):
        raise ShapeError("this pipeline stage has no head and no losses; use forward_stage")
    return forward_stage(model, objective, micro_batch)


def forward_stage(model: nn.Module, objective: Objective, micro_batch: MicroBatch) -> Tensor:
    """What a pipeline stage makes of a micro-batch: for the next stage, or the losses.

    Args:
        model: the two-stream transformer, or a pipeline stage of it.
        objective: computes losses from logits.
        micro_batch: from ``corrupt_rows``; the same on every stage.

    Returns:
        On the last stage weighted nats of every row that needs a loss, float32 [selected], in row-major order
        of ``corrupted.rows``. On earlier stages hidden states, [rows, batch, hidden]: ``stream_rows`` of
        them, divided by the ranks of sequence parallelism.
    """
    corrupted = micro_batch.corrupted
    output = model(
        assemble_streams(corrupted.noisy, corrupted.clean),
        micro_batch.layout,
        noisy_copies=0 if corrupted.noisy is None else corrupted.noisy.shape[1],
        clean=corrupted.clean is not None,
        rows=corrupted.rows,
    )
    if isinstance(output, Tensor):
        return output
    return objective.loss(output, corrupted.targets[corrupted.rows], corrupted.weight[corrupted.rows])
