"""The definition: all logits, the ids that are never predicted at -inf, log-softmax, the target's value."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    excluded: Tensor | None,
    vocab_size: int,
) -> Tensor:
    """Negative log-likelihood of each row in the dtype of its inputs.

    Args:
        hidden: [rows, hidden].
        weight: [padded vocab, hidden].
        bias: [padded vocab] or None.
        targets: int64 [rows], in [0, vocab_size) and not excluded.
        excluded: ids that are never predicted, int64 [ids]; None for none.
        vocab_size: rows of ``weight`` from here on are padding and never predicted.

    Returns:
        nll in nats, [rows].
    """
    logits = _logits(hidden, weight, bias, excluded, vocab_size)
    return -logits.log_softmax(dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def reference_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    *,
    excluded: Tensor | None,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """Logsumexp over the vocabulary and the logits of some ids, in the dtype of the inputs.

    Args:
        hidden: [rows, hidden].
        weight: [padded vocab, hidden].
        bias: [padded vocab] or None.
        ids: int64 [rows, ids], in [0, vocab_size).
        excluded: ids that are never predicted, int64 [ids]; None for none.
        vocab_size: rows of ``weight`` from here on are padding and never predicted.

    Returns:
        (logsumexp [rows], values [rows, ids]).
    """
    logits = _logits(hidden, weight, bias, excluded, vocab_size)
    return logits.logsumexp(dim=-1), logits.gather(1, ids)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, excluded: Tensor | None, vocab_size: int
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    hide = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
    hide[vocab_size:] = True
    if excluded is not None:
        hide[excluded] = True
    return logits.masked_fill(hide, -torch.inf)
