"""One forward pass over held-out rows: the nll of every block under masks of every size.

k of a block's n maskable tokens are masked, k stratified over 1..n and the tokens uniform. That says
everything about any plan (``bdtrain.diffusion.variance``), because the network is not told the time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bdtrain.data.loader import Batch
from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.micro_batch import MicroBatch, corrupt_rows
from bdtrain.diffusion.objectives.base import Objective
from bdtrain.diffusion.variance import BlockRecords
from bdtrain.model.transformer import TwoStreamTransformer
from bdtrain.validation.likelihood import HeldOutRows, gather_rows, split_evenly, token_losses


def measure_blocks(
    model: TwoStreamTransformer,
    objective: Objective,
    rows: HeldOutRows,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> BlockRecords:
    """Measure the blocks of some rows. Every rank must call it; all get all records.

    Args:
        model: this rank's part of the two-stream transformer; in evaluation mode for the time of the call.
        objective: the reported one (``bdtrain.diffusion.build.reported_plan``) of the block size.
        rows: held-out rows; data-parallel ranks share them.
        batch_size: rows per forward pass and rank.
        seed: keys the noise, together with the row's position.
        device: where the model is.

    Returns:
        Records in the order of the rows and of the blocks in a row; the numbers of ranks that share the work
        do not matter, but for rounding in the forward pass.
    """
    groups = model.pg_collection
    key = NoiseKey(seed=seed, purpose=Purpose.REFIT)
    share = rows.batches(batch_size, dp_rank=groups.dp.rank(), dp_size=groups.dp.size())
    whole = rows.batches(batch_size * groups.dp.size())
    was_training = model.training
    model.eval()
    found = []
    try:
        with torch.no_grad():
            for mine, everyones in zip(share, whole, strict=True):
                micro_batches = [
                    corrupt_rows(
                        objective, part, key=key, global_batch_size=batch_size, copies=1, device=device
                    )
                    for part in split_evenly(mine, groups.pp.size())
                ]
                losses = token_losses(model, objective, micro_batches)
                table = gather_rows(torch.cat((losses, token_channels(micro_batches)), dim=1), groups)
                found.append(read_blocks(everyones, table[: len(everyones.tokens)].numpy()))
    finally:
        model.train(was_training)
    return BlockRecords.concatenate(found)


def token_channels(micro_batches: list[MicroBatch]) -> Tensor:
    """What is known of each token besides its loss, float64 [batch, 3, seq].

    Whether it is masked, whether it could have been, and the place of its block's first token.
    """
    parts = [
        torch.stack(
            (
                micro_batch.corrupted.rows[:, 0].double(),
                micro_batch.corrupted.counted.double(),
                micro_batch.layout.block_start.double(),
            ),
            dim=1,
        )
        for micro_batch in micro_batches
    ]
    return torch.cat(parts)


def read_blocks(batch: Batch, table: np.ndarray) -> BlockRecords:
    """Sum tokens to blocks, in float64 and in the order of the tokens.

    Args:
        batch: the rows.
        table: weighted loss, masked, maskable and block start of each token, float64 [batch, 4, seq]. The
            weight is n / k: the objective's is the full bound with k uniform.
    """
    losses, masked, maskable, starts = (table[:, channel] for channel in range(4))
    seq = losses.shape[1]
    block = (np.arange(len(losses))[:, None] * seq + starts.astype(np.int64)).ravel()
    size = len(losses) * seq
    n = np.bincount(block, maskable.ravel(), size)
    k = np.bincount(block, masked.ravel(), size)
    loss = np.bincount(block, losses.ravel(), size)
    real = k > 0
    sequence = np.repeat(batch.sample_index.numpy(), seq)
    return BlockRecords(
        sequence=sequence[real],
        maskable=n[real].astype(np.int32),
        masked=k[real].astype(np.int32),
        nll=loss[real] * k[real] / n[real],
    )
