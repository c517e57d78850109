"""What every objective offers to the training step, and the record of a noised batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from bdtrain.diffusion.keyed import NoiseKey, Purpose
from bdtrain.diffusion.objectives.vocab import VocabView
from bdtrain.diffusion.visibility import BlockLayout


@dataclass(frozen=True)
class Corrupted:
    """A batch as the network and the loss need it. ``out`` is the number of noise copies, 1 for AR.

    Attributes:
        noisy: noised tokens, int64 [batch, copies, seq]; None for AR.
        clean: clean tokens, int64 [batch, seq]; None for an objective without a clean stream.
        rows: which outputs need logits, bool [batch, out, seq].
        targets: the token that an output predicts, int64 [batch, out, seq]; meaningful where ``rows``.
        weight: weight of its cross-entropy, float32 [batch, out, seq]; 0 where not ``rows``.
        counted: tokens in the denominator, bool [batch, seq]: loss = sum over rows / (out * sum of counted).
        level: move_chance drawn (bernoulli) or share masked (count) of the token's block, float32 [batch,
            out, seq]; None for AR.
        maskable_in_block: maskable tokens n of the token's block, int64 [batch, seq]; None for AR.
        unresampled_blocks: blocks too short for the plan's resampling, int64 scalar; None for AR.
    """

    noisy: Tensor | None
    clean: Tensor | None
    rows: Tensor
    targets: Tensor
    weight: Tensor
    counted: Tensor
    level: Tensor | None = None
    maskable_in_block: Tensor | None = None
    unresampled_blocks: Tensor | None = None


class Objective(Protocol):
    """A training objective: pure functions of their arguments, no state that changes."""

    @property
    def name(self) -> str:
        """The config's word for it."""
        ...

    @property
    def clean(self) -> bool:
        """Whether the network gets a clean stream."""
        ...

    @property
    def noisy(self) -> bool:
        """Whether the network gets noisy streams, one per noise copy."""
        ...

    def layout(self, documents: Tensor) -> BlockLayout:
        """Blocks of a batch; ``documents`` int32 [batch, seq] with -1 at padding."""
        ...

    def denominator(self, layout: BlockLayout, counted: Tensor, *, purpose: Purpose) -> Tensor:
        """Tokens that the loss is divided by, bool [batch, seq]: known before any noise is drawn."""
        ...

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
        """Noise a batch: the same bits on every rank, for any split of the global batch, at any time.

        Args:
            x0: clean token ids, int64 [batch, seq].
            layout: from ``layout``.
            counted: bool [batch, seq]; False at padding and at a BOS that begins a fragment. Such tokens stay
                clean.
            key: seed, purpose and step.
            sample_index: global position of each row in the data, int64 [batch].
            batch_index: index of each row in the global batch, int64 [batch].
            global_batch: rows of the global batch.
            copies: noise copies (in evaluation: independent replicates).
        """
        ...

    def loss(self, view: VocabView, targets: Tensor, weight: Tensor) -> Tensor:
        """Weighted nats of each row, float32 [rows].

        Args:
            view: logits of the rows, in row-major order of ``Corrupted.rows``.
            targets: ``corrupted.targets[corrupted.rows]``, int64 [rows].
            weight: ``corrupted.weight[corrupted.rows]``, float32 [rows].
        """
        ...
