"""The one public function: which rows, which ids, how many rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bdtrain_kernels.errors import KernelShapeError
from bdtrain_kernels.masked_cross_entropy.chunked import ChunkedCrossEntropy

CHUNK_NUMBERS = 1 << 20
"""Logits made at a time by default: 4 MiB of float32, which a core's cache nearly holds."""


def masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    excluded: Tensor | Sequence[int] | None,
    vocab_size: int,
    row_weights: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Negative log-likelihood of each given row: output head and cross-entropy, a chunk of rows at a time.

    Args:
        hidden: hidden states of the rows that are predicted (the masked ones), [rows, hidden]; 0 rows are
            fine.
        weight: output embedding, [padded vocab, hidden].
        bias: [padded vocab] or None.
        targets: ids to predict, int64 [rows], in [0, vocab_size). The nll of an excluded id is +inf.
        excluded: ids below ``vocab_size`` that are never predicted (the mask token's), int64 [ids] or a
            list; None for none.
        vocab_size: rows of ``weight`` from here on are padding: never predicted, gradient 0.
        row_weights: what the caller will multiply the rows with before summing, float [rows], up to one
            common factor; no gradient flows to it and the returned nll is not multiplied. When the gradient
            that arrives is that, the head is not computed a second time in backward (one number is then read
            on the host); any other gradient is right too, at the cost of one more product.
        chunk_rows: rows at a time; None keeps a chunk's logits at about 4 MiB.

    Returns:
        nll in nats, [rows], float32 (float64 for float64 inputs).

    Raises:
        KernelShapeError: if the shapes do not fit each other.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise KernelShapeError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}; they must be "
            "[rows, hidden], [vocab, hidden]"
        )
    if targets.shape != hidden.shape[:1] or (row_weights is not None and row_weights.shape != targets.shape):
        found = None if row_weights is None else tuple(row_weights.shape)
        raise KernelShapeError(
            f"targets {tuple(targets.shape)}, row_weights {found}; "
            f"hidden has {hidden.shape[0]} rows, give one each"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise KernelShapeError(f"bias {tuple(bias.shape)}; weight has {weight.shape[0]} rows, give one each")
    if not 0 < vocab_size <= weight.shape[0]:
        raise KernelShapeError(f"vocab_size={vocab_size}; choose 1 to {weight.shape[0]}, the rows of weight")
    if chunk_rows is None:
        chunk_rows = max(16, CHUNK_NUMBERS // vocab_size)
    elif chunk_rows < 1:
        raise KernelShapeError(f"chunk_rows={chunk_rows}; it must be at least 1")
    if excluded is not None and not isinstance(excluded, Tensor):
        excluded = torch.tensor(excluded, dtype=torch.int64, device=weight.device)
    with_gradient = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (hidden, weight, bias)
    )
    detached = None if row_weights is None else row_weights.detach()
    return ChunkedCrossEntropy.apply(
        hidden, weight, bias, targets, excluded, detached, vocab_size, chunk_rows, with_gradient
    )
