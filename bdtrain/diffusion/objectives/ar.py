"""Autoregression: the next token's exact negative log-likelihood, as the baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.objectives.base import Corrupted
from bdtrain.diffusion.objectives.vocab import VocabView
from bdtrain.diffusion.visibility import BlockLayout, build_layout


@dataclass(frozen=True)
class Autoregressive:
    """Next-token prediction on the clean stream; causal is a layout of block_size 1.

    The output at a position predicts the next token when that is in the same fragment (the row, where
    documents are not isolated) and counted. So a fragment's first token is predicted by nothing and is not
    counted, while block diffusion predicts it from an empty context: with a BOS at the start of each fragment
    both count the same tokens.

    Attributes:
        mask_id: id of [MASK], which is never predicted.
        vocab_size: V, [MASK] included.
        isolate_documents: as in block diffusion.
    """

    mask_id: int
    vocab_size: int
    isolate_documents: bool = True

    name = "ar"
    clean = True
    noisy = False

    def layout(self, documents: Tensor) -> BlockLayout:
        """Blocks of one token: plain causal attention inside each document."""
        return build_layout(documents, 1, isolate=self.isolate_documents)

    def denominator(self, layout: BlockLayout, counted: Tensor, *, purpose: Purpose) -> Tensor:
        """The predicted tokens: counted ones that are not first in their fragment, bool [batch, seq]."""
        position = torch.arange(counted.shape[1], device=counted.device)
        return counted & (position > layout.doc_start)

    def corrupt(
        self,
        x0: Tensor,
        layout: BlockLayout,
        counted: Tensor,
        *,
        key: NoiseKey,
        sample_index: Tensor,
        batch_index: Tensor,
        global_batch: int,
        copies: int,
    ) -> Corrupted:
        """Targets and rows; nothing is drawn, so the row numbers and ``copies`` have no effect."""
        predicted = self.denominator(layout, counted, purpose=key.purpose)
        rows = torch.nn.functional.pad(predicted[:, 1:], (0, 1))[:, None]
        return Corrupted(
            noisy=None,
            clean=x0,
            rows=rows,
            targets=x0.roll(-1, dims=1)[:, None],
            weight=rows.to(torch.float32),
            counted=predicted,
        )

    def loss(self, view: VocabView, targets: Tensor, weight: Tensor) -> Tensor:
        """-log p(next token) of each row, float32 [rows]."""
        return view.nll(targets, row_weights=weight) * weight
