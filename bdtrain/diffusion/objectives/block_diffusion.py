"""Block diffusion: masked diffusion inside blocks, autoregression over blocks (arXiv 2503.09573)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.levels import draw_noise
from bdtrain.diffusion.objectives.base import Corrupted
from bdtrain.diffusion.objectives.vocab import VocabView
from bdtrain.diffusion.plan import NoisePlan
from bdtrain.diffusion.tables import PlanTables, compile_tables
from bdtrain.diffusion.visibility import BlockLayout, build_layout
from bdtrain.errors import ConfigError


@dataclass(frozen=True)
class BlockDiffusion:
    """The product's main objective.

    Attributes:
        plan: which noise is drawn and how it weighs; its block size is the objective's.
        mask_id: id of [MASK].
        vocab_size: V, [MASK] included.
        isolate_documents: blocks restart at each document of a row and nothing is seen across documents.
    """

    plan: NoisePlan
    mask_id: int
    vocab_size: int
    isolate_documents: bool = True
    _tables: PlanTables = field(init=False, repr=False, compare=False)

    name = "block_diffusion"
    clean = True
    noisy = True

    def __post_init__(self) -> None:
        """Compile the plan.

        Raises:
            ConfigError: if the mask id is outside the vocabulary.
        """
        if not 0 <= self.mask_id < self.vocab_size:
            raise ConfigError(
                f"mask_id={self.mask_id} is outside the vocabulary of {self.vocab_size}; "
                "use the id of the tokenizer's [MASK]"
            )
        object.__setattr__(self, "_tables", compile_tables(self.plan))

    @property
    def tables(self) -> PlanTables:
        """The compiled plan, on the device that ``corrupt`` last worked on (at first the host)."""
        return self._tables

    def layout(self, documents: Tensor) -> BlockLayout:
        """Blocks of ``plan.block_size`` tokens; ``documents`` int32 [batch, seq]."""
        return build_layout(documents, self.plan.block_size, isolate=self.isolate_documents)

    def denominator(self, layout: BlockLayout, counted: Tensor, *, purpose: Purpose) -> Tensor:
        """Counted tokens; in training under ``reference`` weighting also the BOS of each fragment.

        A BOS is an uncounted token at the start of a fragment that has counted ones; padding is no such
        fragment.
        """
        if self.plan.weighting != "reference" or purpose is not Purpose.TRAIN:
            return counted
        position = torch.arange(counted.shape[1], device=counted.device)
        running = torch.nn.functional.pad(counted.cumsum(dim=1), (1, 0))
        start, end = layout.doc_start.to(torch.int64), layout.doc_end.to(torch.int64)
        is_text = running.gather(1, end) > running.gather(1, start)
        return counted | ((layout.doc_start == position) & is_text)

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
        """Noise a batch; see ``Objective.corrupt``. The rows are the masked tokens."""
        if self._tables.packed_cdf.device != x0.device:
            # Kept there: a copy per step would make the host wait. The values do not change.
            object.__setattr__(self, "_tables", self._tables.to(x0.device))
        noise = draw_noise(
            x0,
            layout,
            counted,
            self.plan,
            self._tables,
            mask_id=self.mask_id,
            key=key,
            sample_index=sample_index,
            batch_index=batch_index,
            global_batch=global_batch,
            copies=copies,
        )
        return Corrupted(
            noisy=noise.xt,
            clean=x0 if self.clean else None,
            rows=noise.masked,
            targets=x0[:, None].expand(noise.xt.shape),
            weight=noise.weight,
            counted=self.denominator(layout, counted, purpose=key.purpose),
            level=noise.level,
            maskable_in_block=noise.maskable_in_block,
            unresampled_blocks=noise.unresampled_blocks,
        )

    def loss(self, view: VocabView, targets: Tensor, weight: Tensor) -> Tensor:
        """Weighted -log p(x0) of each masked row, float32 [rows].

        Source: the SUBS parameterisation of arXiv 2406.07524: [MASK] is never predicted (the view excludes
        it) and a visible token costs nothing (it is no row).
        """
        return view.nll(targets, row_weights=weight) * weight
