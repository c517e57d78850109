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
from bdtrain_kernels import masked_cross_entropy


class VocabularyHead(ColumnParallelLinear):  # type: ignore[misc]
    """Hidden states to logits of this rank's part of the vocabulary, or straight to the nll of tokens.

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
        self.first_id = int(ids[0])

    def forward(
        self, input_: Tensor, targets: Tensor | None = None, row_weights: Tensor | None = None
    ) -> Tensor:
        """Project.

        Args:
            input_: normed hidden states, [rows, hidden].
            targets: token ids, int64 [rows]; only where one rank holds the whole vocabulary.
            row_weights: what the caller will multiply the nll by, [rows]; see ``ParallelVocabView.nll``.

        Returns:
            Local logits [rows, local vocabulary] with -inf at [MASK] and padding, or the nll of ``targets``
            [rows] in float32, for which the logits of all rows never exist together.
        """
        if targets is not None:
            return masked_cross_entropy(
                input_,
                self.weight,
                self.bias,
                targets,
                excluded=[self.config.mask_id],
                vocab_size=self.config.vocab_size,
                row_weights=row_weights,
            )
        logits, _ = super().forward(input_)
        return logits.masked_fill(self.excluded_columns, float("-inf"))


class ParallelVocabView:
    """The objectives' VocabView over the ranks that share the vocabulary; computes what is asked for.

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
                factor. It changes no value; where one rank holds the vocabulary it saves computing the head
                again in the backward pass.
        """
        self._check(ids)
        if self._group.size() == 1 and self._local is None:
            return self._head(self._hidden, ids, row_weights)
        return self.logsumexp() - self.values_at(ids)

    def logsumexp(self) -> Tensor:
        """Log of the sum of exp over the vocabulary, [rows]."""
        peak = self.maximum()
        return peak + self.sum_over_vocab((self.logits() - peak.unsqueeze(-1)).exp()).log()

    def values_at(self, ids: Tensor) -> Tensor:
        """Logit of one token per row, [rows]."""
        self._check(ids)
        local = self.logits()
        index = ids - self._head.first_id
        mine = (index >= 0) & (index < local.shape[-1])
        value = local.gather(-1, index.clamp(0, local.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
        return self._reduce(torch.where(mine, value, torch.zeros_like(value)))

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
