"""Masked diffusion of the whole sequence (arXiv 2406.07524): one block, continuous time."""

from __future__ import annotations

from dataclasses import dataclass

from bdtrain.diffusion.objectives.block_diffusion import BlockDiffusion


@dataclass(frozen=True)
class Mdlm(BlockDiffusion):
    """Block diffusion at block_size = seq_len: a fragment is one block, so the clean stream is never seen.

    The noise is that of ``BlockDiffusion`` at the same block size, bit for bit.
    """

    name = "mdlm"
    clean = False
