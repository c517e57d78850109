"""Self-attention over two streams: Megatron's module, our core, no clean queries in the last layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    linear_with_grad_accumulation_and_async_allreduce,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from bdtrain.model.config import BDTransformerConfig
from bdtrain.model.norm import HeadNorm
from bdtrain.model.rope import RopeTable
from bdtrain.model.streams import to_chunks, to_streams
from bdtrain_kernels import block_attention
from bdtrain_kernels.rotary import rotate_heads


class AttentionContext(Protocol):
    """What a forward pass tells its attention layers; travels as Megatron's ``attention_bias``.

    Megatron closes over that argument when it recomputes activations, so it may be any object.
    """

    @property
    def rope(self) -> RopeTable:
        """Angles of every row of the sequence axis."""

    def output_rows(self, total: int) -> int:
        """How many of a rank's rows, counted from their start, anyone reads after the last layer."""

    def to_streams(self, x: Tensor) -> Tensor:
        """Rows as the ranks' parts lie end to end, put into the order of ``attend``: [rows, ...]."""

    def to_chunks(self, x: Tensor) -> Tensor:
        """The inverse of ``to_streams``."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float) -> Tensor:
        """Attention of [batch, heads, rows, head_dim]; with fewer q than k rows the first rows ask."""


@dataclass(frozen=True)
class StreamContext:
    """Noisy copies and clean stream of a training or evaluation pass.

    Attributes:
        layout: blocks and documents, as ``bdtrain_kernels`` takes them; prepared once for all layers.
        rope: angles of every row of the sequence axis.
        seq: tokens of a stream.
        noisy_copies: noisy streams.
        clean: whether the clean stream follows them.
        backend: attention backend.
        chunks: ranks that split the sequence axis; their rows lie chunk by chunk (``bdtrain.model.streams``).
    """

    layout: Any
    rope: RopeTable
    seq: int
    noisy_copies: int
    clean: bool
    backend: str
    chunks: int = 1

    def output_rows(self, total: int) -> int:
        """The noisy streams', or all when there is only a clean one."""
        if not (self.noisy_copies and self.clean):
            return total
        return self.noisy_copies * (self.seq // self.chunks)

    def to_streams(self, x: Tensor) -> Tensor:
        """Stream after stream."""
        return to_streams(x, chunks=self.chunks, seq=self.seq)

    def to_chunks(self, x: Tensor) -> Tensor:
        """Chunk after chunk."""
        return to_chunks(x, chunks=self.chunks, seq=self.seq)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float) -> Tensor:
        """Block attention."""
        return block_attention(
            q,
            k,
            v,
            self.layout,
            noisy_copies=self.noisy_copies,
            clean=self.clean,
            queries="all" if q.shape[2] == k.shape[2] else "noisy",
            scale=scale,
            backend=self.backend,
        )


class CoreAttention(MegatronModule):
    """Takes the place of Megatron's DotProductAttention; the mask is the context's affair."""

    def __init__(
        self,
        config: BDTransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        """Megatron's constructor of a core attention."""
        super().__init__(config=config)
        self.layer_number = layer_number
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        /,
        *,
        attention_bias: AttentionContext,
        **unused: Any,
    ) -> Tensor:
        """Attend: [seq, batch, local heads, head_dim] in, [seq, batch, local heads * head_dim] out."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = attention_bias.attend(q, k, v, layer=self.layer_number, scale=self.scale)
        return out.permute(2, 0, 1, 3).flatten(2)


class QueryKeyValueLinear(ColumnParallelLinear):  # type: ignore[misc]
    """Megatron's fused projection, without bias, that can leave out the queries of some rows.

    Rows of the weight lie per query group: the queries of the group, its key, its value.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Megatron's constructor, ``bias`` aside."""
        super().__init__(*args, **{**kwargs, "bias": False})

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        query_rows: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Project.

        Args:
            input_: [seq, batch, hidden].
            weight: as Megatron's.
            runtime_gather_output: as Megatron's.
            query_rows: rows from the start of the sequence axis that need queries; None for all, and then the
                second value is None (Megatron's place for a bias).

        Returns:
            Fused queries, keys and values of the first ``query_rows`` rows, and fused keys and values of the
            others: [seq, batch, local groups * (heads per group + 2) * head_dim] and [seq, batch, local
            groups * 2 * head_dim]. Under sequence parallelism ``query_rows`` counts this rank's rows and the
            results hold those of all ranks, rank after rank.
        """
        if query_rows is None:
            fused, _ = super().forward(input_, weight, runtime_gather_output)
            return fused, None
        # One split, not two slices: backward is a concatenation, not two zero-filled buffers and a sum.
        first, rest = input_.split((query_rows, input_.shape[0] - query_rows))
        fused, _ = super().forward(first)
        head_dim = self.config.kv_channels
        heads_per_group = self.config.num_attention_heads // self.config.num_query_groups
        groups = self.weight.unflatten(0, (-1, (heads_per_group + 2) * head_dim))
        # The same call as ColumnParallelLinear makes, on some rows of its weight: with several
        # tensor-parallel ranks the input's gradient is summed over them inside.
        keys_values = linear_with_grad_accumulation_and_async_allreduce(
            rest,
            groups[:, heads_per_group * head_dim :].flatten(0, 1),
            None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=self.allreduce_dgrad,
            sequence_parallel=self.sequence_parallel,
            tp_group=self.tp_group,
        )
        return fused, keys_values


class UnbiasedRowParallelLinear(RowParallelLinear):  # type: ignore[misc]
    """Megatron's output projection without the bias that ``add_bias_linear`` (for the MLP) would give."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Megatron's constructor, ``bias`` aside."""
        super().__init__(*args, **{**kwargs, "bias": False})


class TwoStreamSelfAttention(SelfAttention):  # type: ignore[misc]
    """Megatron's SelfAttention with one forward of our own.

    Parameters, their names and their sharding are the library's. Ours are the rotation from given positions
    and, in the last layer of the model, queries for the noisy streams only: nothing reads the clean stream
    after it.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *unused_args: Any,
        attention_bias: AttentionContext,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: normed input of all streams, [seq, batch, hidden]; this rank's rows of them under
                sequence parallelism.
            attention_mask: not used; the context knows who sees whom.
            *unused_args: Megatron's other arguments.
            attention_bias: the context of the forward pass.
            **unused: Megatron's other arguments.

        Returns:
            Output of the rows that are read later, [rows, batch, hidden], and no bias.
        """
        context = attention_bias
        total = hidden_states.shape[0]
        last = self.layer_number == self.config.num_layers
        rows = context.output_rows(total) if last else total
        query, key, value = self._project(hidden_states, rows, context)
        attend = self.core_attention
        if self.checkpoint_core_attention and self.training:
            attend = self._checkpointed_attention_forward
        mixed = attend(query, key, value, None, attn_mask_type=self.attn_mask_type, attention_bias=context)
        out, bias = self.linear_proj(context.to_chunks(mixed))
        return out, bias

    def _project(
        self, hidden: Tensor, query_rows: int, context: AttentionContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the first rows, keys and values of all: [seq, batch, heads, head_dim].

        Under sequence parallelism the rows of all ranks come back, stream after stream.
        """
        if query_rows == hidden.shape[0]:
            fused, rest = self.linear_qkv(hidden)[0], None
        else:
            fused, rest = self.linear_qkv(hidden, query_rows=query_rows)
        # The rest is one stream: its chunks follow each other already.
        fused = context.to_streams(fused)
        groups, dim = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        heads = self.num_attention_heads_per_partition // groups
        query, key, value = fused.unflatten(-1, (groups, -1)).split((heads * dim, dim, dim), dim=-1)
        # Groups stay an axis of their own: with them flattened the view would become a copy.
        query = query.unflatten(-1, (heads, dim))
        if rest is not None:
            clean_key, clean_value = rest.unflatten(-1, (groups, -1)).split((dim, dim), dim=-1)
            key, value = torch.cat((key, clean_key)), torch.cat((value, clean_value))
        query = _turn(query, context.rope.rows(query.shape[0]), self.q_layernorm)
        return query, _turn(key, context.rope, self.k_layernorm), value


def _turn(x: Tensor, table: RopeTable, norm: HeadNorm | None) -> Tensor:
    """Heads turned by their positions, normed before where the shape has that norm."""
    return rotate_heads(x, table.cos, table.sin) if norm is None else norm(x, table)
