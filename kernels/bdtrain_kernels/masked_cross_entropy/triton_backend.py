"""Triton backend: logits stay in the model's dtype, one pass reads them, one overwrites them by gradients."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from bdtrain_kernels.masked_cross_entropy.plan import Plan, Summary
from bdtrain_kernels.masked_cross_entropy.triton_kernels import (
    GRADIENT_BLOCK,
    NUM_WARPS,
    SUMMARY_BLOCK,
    summarise_rows,
    write_score_gradients,
)


class TritonChunks:
    """See ``Chunks``. A state is the chunk's raw logits, padding included.

    The products run over the padded vocabulary, whose rows are aligned; a cut at the last real id would take
    the slow paths of the matrix library.

    Args:
        plan: of the call.
        rows: of the call.
        weight: this rank's part, [padded vocab, hidden].
        bias: [padded vocab] or None.
    """

    def __init__(self, plan: Plan, rows: int, weight: Tensor, bias: Tensor | None) -> None:
        """Make room for a chunk."""
        self._plan, self._weight, self._bias = plan, weight, bias
        self._room = torch.empty(
            min(plan.chunk_rows, rows), weight.shape[0], dtype=weight.dtype, device=weight.device
        )

    def summarise(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Summary]:
        """See ``Chunks``."""
        logits, ids = self._logits(hidden), ids.contiguous()
        summary = Summary.empty(ids, torch.float32)
        excluded, num_excluded = self._excluded(ids)
        summarise_rows[(logits.shape[0],)](
            logits,
            ids,
            excluded,
            *summary,
            logits.stride(0),
            self._plan.first_id,
            self._plan.columns,
            logits.shape[1],
            ids.shape[1],
            num_excluded,
            block=SUMMARY_BLOCK,
            num_warps=NUM_WARPS,
            num_stages=1,
        )
        return logits, summary

    def again(self, hidden: Tensor, shift: Tensor) -> Tensor:
        """See ``Chunks``; nothing is shifted before the gradients are written."""
        return self._logits(hidden)

    def score_gradients(
        self, state: Tensor, shift: Tensor, factor: Tensor, ids: Tensor, id_factors: Tensor
    ) -> Tensor:
        """See ``Chunks``; rounded to the model's dtype once, after the sum."""
        ids = ids.contiguous()
        excluded, num_excluded = self._excluded(ids)
        write_score_gradients[(state.shape[0], triton.cdiv(state.shape[1], GRADIENT_BLOCK))](
            state,
            ids,
            id_factors.contiguous(),
            excluded,
            shift.contiguous(),
            factor.contiguous(),
            state.stride(0),
            self._plan.first_id,
            self._plan.columns,
            state.shape[1],
            ids.shape[1],
            num_excluded,
            block=GRADIENT_BLOCK,
            num_warps=NUM_WARPS,
            num_stages=1,
        )
        return state

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self._room[: hidden.shape[0]]
        if self._bias is None:
            return torch.mm(hidden, self._weight.t(), out=logits)
        return torch.addmm(self._bias, hidden, self._weight.t(), out=logits)

    def _excluded(self, ids: Tensor) -> tuple[Tensor, int]:
        """The excluded ids and their number; a kernel needs some pointer even for none."""
        excluded = self._plan.excluded
        return (ids, 0) if excluded is None else (excluded, excluded.shape[0])
