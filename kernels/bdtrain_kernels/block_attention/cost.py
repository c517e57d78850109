"""What the dense and the tree backend cost on a CPU, in scores per head: "auto" takes the smaller one.

Fitted to kernels/bench/2026-11-21-cpu-attention.md (head_dim 32, 8 heads). A score costs about the same in
both; the tree pays besides for packing and merging its rows, and for every document, which is copied on its
own.
"""

from __future__ import annotations

from bdtrain_kernels.block_attention.reference import Layout
from bdtrain_kernels.block_attention.tiling import Tiling

SCORES_PER_ROW = 80
SCORES_PER_STRIP = 6000


def dense_cost(layout: Layout, noisy_copies: int) -> int:
    """Scores of a batch: noisy rows against two streams, clean rows against one.

    Args:
        layout: blocks and documents.
        noisy_copies: noisy streams, 1 or more; the clean stream is there.
    """
    batch, seq = layout.block_start.shape
    return batch * seq * seq * (2 * noisy_copies + 1)


def tree_cost(tiling: Tiling, noisy_copies: int) -> int:
    """Scores of a batch and the overhead of rows and strips.

    Args:
        tiling: the cut of the batch.
        noisy_copies: noisy streams, 1 or more; the clean stream is there.
    """
    streams = noisy_copies + 1
    tile = tiling.tile
    own = tiling.num_tiles * tile * tile * (streams if tiling.one_block else 2 * noisy_copies + 1)
    levels = sum(odds.count * odds.length * evens.length for evens, odds in tiling.levels)
    rows = tiling.num_tiles * tile * streams
    return (
        own + levels * tile * tile * streams + SCORES_PER_ROW * rows + SCORES_PER_STRIP * len(tiling.strips)
    )
