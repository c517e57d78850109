"""Chunked backend: plain torch, any device; logits become exponentials, then gradients, in one place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bdtrain_kernels.masked_cross_entropy.plan import Plan, Summary, accumulation_dtype


class TorchChunks:
    """See ``Chunks``. A state holds exp(logit - shift) in the accumulation dtype.

    Args:
        plan: of the call.
        rows: of the call.
        weight: this rank's part, [padded vocab, hidden].
        bias: [padded vocab] or None.
    """

    def __init__(self, plan: Plan, rows: int, weight: Tensor, bias: Tensor | None) -> None:
        """Make room for a chunk: fresh memory for each would cost its first touch each time."""
        self._plan = plan
        # A rank that holds padding alone keeps one column of it, hidden like an excluded id.
        self._width = max(1, plan.columns)
        self._weight = weight[: self._width]
        self._bias = None if bias is None else bias[: self._width]
        self._room = torch.empty(
            min(plan.chunk_rows, rows), self._width, dtype=accumulation_dtype(weight), device=weight.device
        )

    def summarise(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Summary]:
        """See ``Chunks``."""
        logits = self._logits(hidden)
        index, mine = self._local(ids)
        values = logits.gather(1, index).masked_fill_(~mine, 0.0)
        # Finite even where nothing is left to predict on this rank: -inf - -inf is no number.
        peak = logits.amax(dim=-1).clamp_(min=torch.finfo(logits.dtype).min)
        total = logits.sub_(peak.unsqueeze(1)).exp_().sum(dim=-1)
        return logits, Summary(peak, total, values)

    def again(self, hidden: Tensor, shift: Tensor) -> Tensor:
        """See ``Chunks``."""
        return self._logits(hidden).sub_(shift.unsqueeze(1)).exp_()

    def score_gradients(
        self, state: Tensor, shift: Tensor, factor: Tensor, ids: Tensor, id_factors: Tensor
    ) -> Tensor:
        """See ``Chunks``."""
        index, mine = self._local(ids)
        if self._plan.excluded is not None:
            mine &= (ids.unsqueeze(-1) != self._plan.excluded).all(dim=-1)
        added = id_factors.to(state.dtype) * mine
        state.mul_(factor.unsqueeze(1))
        for k in range(ids.shape[1]):  # one at a time: a row may name an id twice, and sums keep their order
            state.scatter_add_(1, index[:, k : k + 1], added[:, k : k + 1])
        return state

    def _logits(self, hidden: Tensor) -> Tensor:
        """Of the real ids, the excluded ones at -inf, [rows, width]."""
        logits = self._room[: hidden.shape[0]]
        if logits.dtype != hidden.dtype:
            logits.copy_(F.linear(hidden, self._weight, self._bias))
        elif self._bias is None:
            torch.mm(hidden, self._weight.t(), out=logits)
        else:
            torch.addmm(self._bias, hidden, self._weight.t(), out=logits)
        if self._plan.columns == 0:
            return logits.fill_(-torch.inf)
        if self._plan.excluded is None:
            return logits
        if self._plan.group is None:
            return logits.index_fill_(1, self._plan.excluded, -torch.inf)
        # Which of them are this rank's is known on the device alone: the others lower nothing.
        index, mine = self._local(self._plan.excluded.expand(hidden.shape[0], -1))
        lowered = logits.new_full((), torch.inf).where(~mine, -torch.inf)
        return logits.scatter_reduce_(1, index, lowered, "amin")

    def _local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of ids on this rank, and whether they are its own (else the column is any)."""
        index = ids - self._plan.first_id
        mine = (index >= 0) & (index < self._plan.columns)
        return index.clamp(0, self._width - 1), mine
