"""How a call is cut: which part of the vocabulary this rank holds, how many rows at a time, which backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """What stays the same over all chunks of a call.

    Attributes:
        first_id: id of the first row of this rank's weight.
        columns: rows of the weight that are real ids; those behind are padding. May be 0 on the last ranks.
        excluded: ids of the whole vocabulary that are never predicted, int64 [ids]; None for none.
        group: ranks that share the vocabulary in equal parts; None where one holds it all.
        chunk_rows: rows at a time, the same on every rank.
        backend: "chunked" or "triton".
    """

    first_id: int
    columns: int
    excluded: Tensor | None
    group: dist.ProcessGroup | None
    chunk_rows: int
    backend: str

    def slices(self, rows: int) -> Iterator[slice]:
        """The chunks of ``rows`` rows."""
        return (slice(begin, begin + self.chunk_rows) for begin in range(0, rows, self.chunk_rows))

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """``x`` summed over the ranks that share the vocabulary, in place; ``x`` must be contiguous."""
        if self.group is not None and x.numel():
            dist.all_reduce(x, dist.ReduceOp.SUM, group=self.group)
        return x


class Summary(NamedTuple):
    """Of each row over a part of the vocabulary; all float32, or float64 for float64 inputs.

    Attributes:
        peak: largest logit, [rows]; the smallest finite number where there is none.
        total: sum of exp(logit - peak), [rows].
        values: logits of the ids that were asked for, [rows, ids]; 0 where another rank holds the id, -inf
            where it is excluded.
    """

    peak: Tensor
    total: Tensor
    values: Tensor

    @classmethod
    def empty(cls, ids: Tensor, dtype: torch.dtype) -> Summary:
        """Room for the rows of ``ids`` [rows, ids]."""
        rows = ids.shape[0]
        return cls(
            *(torch.empty(shape, dtype=dtype, device=ids.device) for shape in ((rows,), (rows,), ids.shape))
        )

    def put(self, chunk: slice, part: Summary) -> None:
        """Fill in the rows of a chunk."""
        for whole, new in zip(self, part, strict=True):
            whole[chunk] = new

    def over_ranks(self, plan: Plan) -> Summary:
        """Of the whole vocabulary, in two small collectives: the peaks first, then all that is added up."""
        if plan.group is None or not self.peak.numel():
            return self
        peak = self.peak.clone()
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=plan.group)
        total = self.total * (self.peak - peak).exp()
        sums = plan.sum_over_ranks(torch.cat((total.unsqueeze(1), self.values), dim=1))
        return Summary(peak, sums[:, 0], sums[:, 1:])


class Chunks(Protocol):
    """A backend: the logits of some rows on this rank, what is read from them, and their gradients.

    A ``state`` is what it keeps of a chunk between two calls; it is lost when the next chunk begins.
    """

    def summarise(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Summary]:
        """Logits of ``hidden`` [rows, hidden], summarised with the values at ``ids`` [rows, ids].

        Returns:
            The state, whose exponentials are shifted by the summary's own peak, and the summary.
        """
        ...

    def again(self, hidden: Tensor, shift: Tensor) -> Tensor:
        """The state of a chunk computed anew, its exponentials shifted by ``shift`` [rows]."""
        ...

    def score_gradients(
        self, state: Tensor, shift: Tensor, factor: Tensor, ids: Tensor, id_factors: Tensor
    ) -> Tensor:
        """exp(logit - shift) * factor, plus ``id_factors`` at ``ids``; 0 at excluded ids and padding.

        Args:
            state: from ``summarise`` or ``again``; it is overwritten.
            shift: what it was shifted by, [rows].
            factor: [rows].
            ids: [rows, ids], of the whole vocabulary.
            id_factors: [rows, ids].

        Returns:
            [rows, columns of the weight's first rows].
        """
        ...


def accumulation_dtype(hidden: Tensor) -> torch.dtype:
    """In which sums are made: float64 for float64 inputs, else float32."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def make_chunks(plan: Plan, rows: int, weight: Tensor, bias: Tensor | None) -> Chunks:
    """The backend that the plan names, with room for one chunk of ``rows`` rows."""
    if plan.backend == "triton":
        from bdtrain_kernels.masked_cross_entropy.triton_backend import TritonChunks

        return TritonChunks(plan, rows, weight, bias)
    from bdtrain_kernels.masked_cross_entropy.chunked import TorchChunks

    return TorchChunks(plan, rows, weight, bias)
