"""Final projection onto the vocabulary, and the view of its logits that objectives compute with."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from bdtrain.errors import ShapeError
from bdtrain.model.config import BDTransformerConfig, leave_unset
from bdtrain_kernels.masked_cross_entropy import masked_cross_entropy, row_statistics


class VocabularyHead(ColumnParallelLinear):  # type: ignore[misc]
    """Hidden states to logits of this rank's part of the vocabulary, or straight to what a loss needs.

    Args:
        config: of the model.
        tp_group: ranks that share the vocabulary.
    """

    def __init__(self, config: BDTransformerConfig, *, tp_group: Any) -> None:
        """See the class."""
        super().__init__(
            config.hidden_size,
            config.padded_vocab_size,
            config=config,
            init_method=leave_unset,
            bias=config.biased,
            gather_output=False,
            tp_group=tp_group,
        )
        # The rows that come are whole already, each rank has all of them: no gathering here.
        self.sequence_parallel = False
        self.allreduce_dgrad = tp_group.size() > 1
        ids = torch.arange(self.output_size_per_partition) + tp_group.rank() * self.output_size_per_partition
        excluded = (ids == config.mask_id) | (ids >= config.vocab_size)
        self.register_buffer("excluded_columns", excluded, persistent=False)
        # On the device beforehand: a list would be copied there at each call, and the host would wait.
        self.register_buffer("excluded_ids", torch.tensor([config.mask_id]), persistent=False)
        self.first_id = int(ids[0])

    def forward(
        self,
        input_: Tensor,
        targets: Tensor | None = None,
        row_weights: Tensor | None = None,
        values_at: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Project, or answer what a loss asks of the logits without holding those of all rows.

        Args:
            input_: normed hidden states, [rows, hidden].
            targets: token ids, int64 [rows]: their nll is returned.
            row_weights: what the caller will multiply the nll by, [rows]; see ``ParallelVocabView.nll``.
            values_at: token ids, int64 [rows, ids]: logsumexp and their logits are returned.

        Returns:
            Local logits [rows, local vocabulary] with -inf at [MASK] and padding; or the nll of ``targets``
            [rows]; or (logsumexp [rows], logits at ``values_at`` [rows, ids]). The last two are at least
            float32 and the same on every rank.
        """
        of_whole_vocabulary: dict[str, Any] = {
            "excluded": self.excluded_ids,
            "vocab_size": self.config.vocab_size,
            "group": self.tp_group,
        }
        if targets is not None:
            return masked_cross_entropy(
                input_, self.weight, self.bias, targets, row_weights=row_weights, **of_whole_vocabulary
            )
        if values_at is not None:
            return row_statistics(input_, self.weight, self.bias, values_at, **of_whole_vocabulary)
        logits, _ = super().forward(input_)
        return logits.masked_fill(self.excluded_columns, float("-inf"))


class ParallelVocabView:
    """The objectives' VocabView over the ranks that share the vocabulary; computes what is asked for.

    The logits of all rows exist once ``logits``, ``maximum`` or ``sum_over_vocab`` has been asked for, and
    everything is read from them from then on. ``nll``, ``statistics``, ``logsumexp`` and ``values_at`` alone
    make those of a few rows at a time.

    [MASK] and the padding columns are at -inf. Values returned are the same on every tensor-parallel rank,
    except ``logits``, which is the rank's own shard.

    Args:
        hidden: normed hidden states of the rows, [rows, hidden].
        head: the head.
    """

    def __init__(self, hidden: Tensor, head: VocabularyHead) -> None:
        """See the class."""
        self._hidden = hidden
        self._head = head
        self._local: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the view."""
        return self._hidden.shape[0]

    @property
    def hidden(self) -> Tensor:
        """Normed hidden states of the rows, [rows, hidden]."""
        return self._hidden

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary, [MASK] included, padding not."""
        return int(self._head.config.vocab_size)

    def logits(self) -> Tensor:
        """This rank's shard, [rows, local vocabulary], at least float32."""
        if self._local is None:
            local = self._head(self._hidden)
            self._local = local.float() if local.dtype in (torch.bfloat16, torch.float16) else local
        return self._local

    def nll(self, ids: Tensor, row_weights: Tensor | None = None) -> Tensor:
        """-log p of one token per row, [rows].

        Args:
            ids: token ids, int64 [rows]; neither [MASK] nor padding.
            row_weights: what the caller will multiply the rows by before summing, [rows], up to one common
                factor. It changes no value; it saves computing the head again in the backward pass.
        """
        self._check(ids)
        if self._local is None:
            nll: Tensor = self._head(self._hidden, ids, row_weights)
            return nll
        return self.logsumexp() - self.values_at(ids)

    def statistics(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the sum of exp over the vocabulary [rows], and some logits of each row [rows, ids].

        One pass over the vocabulary for both, and a second one in backward.

        Args:
            ids: token ids, int64 [rows, ids], not padding; the logit of [MASK] is -inf.
        """
        if ids.dim() != 2 or ids.shape[0] != self.num_rows:
            raise ShapeError(
                f"ids has shape {tuple(ids.shape)}; the view holds {self.num_rows} rows, "
                f"so [{self.num_rows}, ids]"
            )
        if self._local is None:
            answer: tuple[Tensor, Tensor] = self._head(self._hidden, values_at=ids)
            return answer
        return self._logsumexp_of_logits(), self._values_of_logits(ids)

    def logsumexp(self) -> Tensor:
        """Log of the sum of exp over the vocabulary, [rows]."""
        none = torch.empty(self.num_rows, 0, dtype=torch.int64, device=self._hidden.device)
        return self.statistics(none)[0]

    def values_at(self, ids: Tensor) -> Tensor:
        """Logit of one token per row, [rows]; ask ``statistics`` where the logsumexp is needed too."""
        self._check(ids)
        return self.statistics(ids.unsqueeze(1))[1].squeeze(1)

    def maximum(self) -> Tensor:
        """Largest logit, [rows]; carries no gradient (it only ever shifts exponents)."""
        local = self.logits().detach().amax(dim=-1, keepdim=True)
        return gather_from_tensor_model_parallel_region(local, group=self._group).amax(dim=-1)

    def sum_over_vocab(self, x: Tensor) -> Tensor:
        """Sum over the whole vocabulary of a quantity given on this rank's shard.

        Args:
            x: [rows, local vocabulary]; 0 at the excluded columns.

        Returns:
            [rows].
        """
        return self._reduce(x.sum(dim=-1))

    def _logsumexp_of_logits(self) -> Tensor:
        peak = self.maximum()
        return peak + self.sum_over_vocab((self.logits() - peak.unsqueeze(-1)).exp()).log()

    def _values_of_logits(self, ids: Tensor) -> Tensor:
        local = self.logits()
        index = ids - self._head.first_id
        mine = (index >= 0) & (index < local.shape[-1])
        value = local.gather(-1, index.clamp(0, local.shape[-1] - 1))
        return self._reduce(torch.where(mine, value, torch.zeros_like(value)))

    @property
    def _group(self) -> Any:
        return self._head.tp_group

    def _reduce(self, x: Tensor) -> Tensor:
        # Megatron reduces in place, and not at all where it would have to copy: a fresh contiguous tensor is
        # needed.
        summed: Tensor = reduce_from_tensor_model_parallel_region(x.clone().contiguous(), group=self._group)
        return summed

    def _check(self, ids: Tensor) -> None:
        if ids.shape != (self.num_rows,):
            raise ShapeError(
                f"ids has shape {tuple(ids.shape)}; the view holds {self.num_rows} rows, so [{self.num_rows}]"
            )
