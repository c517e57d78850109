"""From rows of text to the loss of each row that has one: common to training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from bdtrain.diffusion.keyed import NoiseKey
from bdtrain.diffusion.objectives.base import Corrupted, Objective
from bdtrain.diffusion.visibility import BlockLayout
from bdtrain.errors import ShapeError
from bdtrain.model.transformer import assemble_streams


class Rows(Protocol):
    """Rows of a batch, as the data room gives them.

    Attributes:
        tokens: token ids, int64 [batch, seq].
        documents: document number inside the row, int32 [batch, seq]; -1 for padding.
        counted: tokens that count, bool [batch, seq].
        sample_index: global position of the row in the data, int64 [batch].
        batch_index: index of the row in the global batch, int64 [batch].
    """

    @property
    def tokens(self) -> Tensor: ...  # noqa: D102
    @property
    def documents(self) -> Tensor: ...  # noqa: D102
    @property
    def counted(self) -> Tensor: ...  # noqa: D102
    @property
    def sample_index(self) -> Tensor: ...  # noqa: D102
    @property
    def batch_index(self) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch, corrupted and ready for the model.

    Attributes:
        layout: blocks and documents, [batch, seq].
        corrupted: streams, rows that need logits, targets and weights.
    """

    layout: BlockLayout
    corrupted: Corrupted


def corrupt_rows(
    objective: Objective,
    rows: Rows,
    *,
    key: NoiseKey,
    global_batch_size: int,
    copies: int,
    device: torch.device,
) -> MicroBatch:
    """Lay out and corrupt some rows.

    Args:
        objective: draws the noise.
        rows: rows of the batch, tokens [rows, seq].
        key: seed, purpose and step of the draw.
        global_batch_size: rows over which noise levels are stratified.
        copies: noisy copies of each row.
        device: where the result is.
    """
    layout = objective.layout(rows.documents.to(device))
    corrupted = objective.corrupt(
        rows.tokens.to(device),
        layout,
        rows.counted.to(device),
        key=key,
        sample_index=rows.sample_index.to(device),
        batch_index=rows.batch_index.to(device),
        global_batch=global_batch_size,
        copies=copies,
    )
    return MicroBatch(layout=layout, corrupted=corrupted)


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
