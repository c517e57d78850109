"""The token embedding, with a gradient that many rows of one token do not spoil."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from bdtrain.model.config import BDTransformerConfig, leave_unset


class TokenEmbedding(VocabParallelEmbedding):  # type: ignore[misc]
    """Megatron's embedding of a shared vocabulary; under sequence parallelism each rank keeps its rows.

    Args:
        config: of the model.
        tp_group: ranks that share the vocabulary.
    """

    def __init__(self, config: BDTransformerConfig, *, tp_group: Any) -> None:
        """See the class."""
        super().__init__(
            config.padded_vocab_size,
            config.hidden_size,
            init_method=leave_unset,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=tp_group,
        )

    def forward(self, input_: Tensor) -> Tensor:
        """Look up ids, int64 [batch, rows].

        Returns:
            [rows, batch, hidden]; under sequence parallelism this rank's rows.
        """
        # Turning the ids, not the activations, gives Megatron's [rows, batch, hidden] for nothing.
        ids = input_.t().contiguous()
        index = ids - self.vocab_start_index
        mine = (index >= 0) & (index < self.num_embeddings_per_partition)
        whole = self.tp_group.size() == 1
        found: Tensor = _Lookup.apply(self.weight, ids if whole else index, None if whole else mine)
        if self.reduce_scatter_embeddings:
            states: Tensor = reduce_scatter_to_sequence_parallel_region(found, group=self.tp_group)
        else:
            states = reduce_from_tensor_model_parallel_region(found, group=self.tp_group)
        return states


class _Lookup(torch.autograd.Function):
    """Rows of a table, 0 where the token is another rank's; the gradient is summed in float32 at least.

    Half the noisy rows are [MASK]: a bfloat16 sum over thousands of them, as torch makes it on a CPU, loses
    most of its digits.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor, mine: Tensor | None) -> Tensor:
        ctx.save_for_backward(index, mine)
        ctx.tokens, ctx.dtype = weight.shape[0], weight.dtype
        if mine is None:
            return F.embedding(index, weight)
        return F.embedding(index.masked_fill(~mine, 0), weight).masked_fill_(~mine.unsqueeze(-1), 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        index, mine = ctx.saved_tensors
        if mine is not None:
            index = index.masked_fill(~mine, 0)
            grad = grad.masked_fill(~mine.unsqueeze(-1), 0.0)
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        # Autograd rounds it to the type in which the parameter's gradient accumulates.
        return torch.ops.aten.embedding_dense_backward(wide, index, ctx.tokens, -1, False), None, None
