"""From rows of text to a corrupted micro-batch: common to training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bdtrain.diffusion.keyed import NoiseKey
from bdtrain.diffusion.objectives.base import Corrupted, Objective
from bdtrain.diffusion.visibility import BlockLayout


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
