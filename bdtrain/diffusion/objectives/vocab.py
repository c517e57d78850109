"""Logits as an objective sees them, whether one process holds the vocabulary or ranks share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bdtrain.errors import ShapeError


class VocabView(Protocol):
    """The logits of some rows over the vocabulary.

    [MASK] and the padding rows of the vocabulary are excluded: they count as -inf in every method.
    """

    @property
    def num_rows(self) -> int:
        """Rows held by this view."""
        ...

    @property
    def vocab_size(self) -> int:
        """V, [MASK] included, padding not."""
        ...

    def nll(self, ids: Tensor, row_weights: Tensor | None = None) -> Tensor:
        """-log p(id) of each row, float32 [rows].

        Args:
            ids: int64 [rows].
            row_weights: what the caller will multiply the rows with before summing, up to one factor, [rows].
                Changes no value; a fused head uses it to make its gradients in the forward pass.
        """
        ...

    def logits(self) -> Tensor:
        """This rank's shard of the logits, float32 [rows, local], -inf where excluded."""
        ...

    def logsumexp(self) -> Tensor:
        """Over the whole vocabulary, float32 [rows]."""
        ...

    def values_at(self, ids: Tensor) -> Tensor:
        """The logit of one id per row, float32 [rows]; ``ids`` int64 [rows]."""
        ...

    def statistics(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """``logsumexp`` [rows] and the logits of some ids of each row [rows, ids], in one pass for both.

        Args:
            ids: int64 [rows, ids].
        """
        ...

    def maximum(self) -> Tensor:
        """Largest logit of each row over the whole vocabulary, float32 [rows]."""
        ...

    def sum_over_vocab(self, x: Tensor) -> Tensor:
        """Sum over the whole vocabulary of a local [rows, local] tensor made from ``logits()``, [rows].

        Excluded columns must hold 0.
        """
        ...


class DenseVocabView:
    """The whole vocabulary in one tensor: one process, and tests.

    Args:
        logits: [rows, padded vocabulary], any float dtype.
        vocab_size: V; columns from V on are padding.
        excluded_ids: ids below V that are never predicted, such as [MASK].

    Raises:
        ShapeError: if ``logits`` is not [rows, at least vocab_size].
    """

    def __init__(self, logits: Tensor, vocab_size: int, excluded_ids: Sequence[int]) -> None:
        """Exclude [MASK] and padding."""
        if logits.dim() != 2 or logits.shape[1] < vocab_size:
            raise ShapeError(
                f"logits have shape {tuple(logits.shape)}; expected [rows, at least vocab_size={vocab_size}]"
            )
        excluded = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        excluded[vocab_size:] = True
        excluded[list(excluded_ids)] = True
        wide = logits if logits.dtype == torch.float64 else logits.to(torch.float32)
        self._logits = wide.masked_fill(excluded, -torch.inf)
        self._vocab_size = vocab_size

    @property
    def num_rows(self) -> int:
        """Rows held by this view."""
        return self._logits.shape[0]

    @property
    def vocab_size(self) -> int:
        """V, [MASK] included, padding not."""
        return self._vocab_size

    def nll(self, ids: Tensor, row_weights: Tensor | None = None) -> Tensor:
        """-log p(id) of each row, [rows]; ``row_weights`` has no use here."""
        return torch.nn.functional.cross_entropy(self._logits, ids, reduction="none")

    def logits(self) -> Tensor:
        """All logits, [rows, padded], -inf where excluded; float32, or float64 where it was given so."""
        return self._logits

    def logsumexp(self) -> Tensor:
        """Over the vocabulary, [rows]."""
        return self._logits.logsumexp(dim=-1)

    def values_at(self, ids: Tensor) -> Tensor:
        """The logit of one id per row, [rows]."""
        return self._logits.gather(1, ids[:, None]).squeeze(1)

    def statistics(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Over the vocabulary [rows], and the logits of some ids [rows, ids]."""
        return self.logsumexp(), self._logits.gather(1, ids)

    def maximum(self) -> Tensor:
        """Largest logit of each row, [rows]."""
        return self._logits.amax(dim=-1)

    def sum_over_vocab(self, x: Tensor) -> Tensor:
        """Sum of a [rows, padded] tensor that holds 0 at the excluded columns, [rows]."""
        return x.sum(dim=-1)
