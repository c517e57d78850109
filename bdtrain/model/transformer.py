"""The model: embedding, layers, final norm and head over noisy and clean streams laid end to end.

Outside this file activations are [batch, ...]; inside Megatron's layers they are [seq, batch, hidden]. Both
turns are here.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor

from bdtrain.diffusion.visibility import BlockLayout
from bdtrain.errors import ShapeError
from bdtrain.model.attention import AttentionContext, StreamContext
from bdtrain.model.config import BDTransformerConfig
from bdtrain.model.embedding import TokenEmbedding
from bdtrain.model.head import ParallelVocabView, VocabularyHead
from bdtrain.model.layer import layer_spec
from bdtrain.model.norm import norm_class
from bdtrain.model.rope import RopeTable, make_rope_table
from bdtrain.model.streams import to_chunks, to_streams
from bdtrain_kernels import prepare


class TwoStreamTransformer(MegatronModule):  # type: ignore[misc]
    """Transformer that sees noisy copies of a text and the clean text in one pass.

    Streams lie noisy_1 .. noisy_C, clean along the sequence axis, each at positions 0 .. seq-1. One class
    serves block diffusion (C copies and clean), MDLM (copies only) and autoregression (clean only).

    Args:
        config: from ``build_transformer_config``.
        pg_collection: process groups; ``tp`` and ``pp`` are read.
        pre_process: whether this pipeline stage holds the embedding.
        post_process: whether it holds the final norm and the head.

    Source: arXiv 2503.09573, the vectorised training pass over x_t and x_0 joined.
    """

    def __init__(
        self,
        config: BDTransformerConfig,
        *,
        pg_collection: Any,
        pre_process: bool = True,
        post_process: bool = True,
    ) -> None:
        """See the class."""
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder  # Megatron's schedules look for it
        self.pg_collection = pg_collection
        self.pre_process = pre_process
        self.post_process = post_process
        if pre_process:
            self.embedding = TokenEmbedding(config, tp_group=pg_collection.tp)
        layers = get_num_layers_to_build(config, pp_rank=pg_collection.pp.rank())
        self.decoder = TransformerBlock(
            config,
            TransformerBlockSubmodules(
                layer_specs=[layer_spec(config)] * layers, layer_norm=norm_class(config)
            ),
            # The final norm is below: only the rows that reach the head need it.
            post_layer_norm=False,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
        )
        if config.sequence_parallel:
            # The block (not its layers) reads one thing there: whether to fork Megatron's global random
            # state, which nobody seeded. Nothing in the layers draws.
            self.decoder.config = copy(config)
            self.decoder.config.sequence_parallel = False
        if post_process:
            self.final_layernorm = norm_class(config)(config, config.hidden_size, config.layernorm_epsilon)
            self.output_layer = VocabularyHead(config, tp_group=pg_collection.tp)

    @property
    def chunks(self) -> int:
        """Ranks that split the sequence axis between the embedding and the final norm."""
        return int(self.pg_collection.tp.size()) if self.config.sequence_parallel else 1

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """Take the previous pipeline stage's output; Megatron's schedules call this before ``forward``."""
        if isinstance(input_tensor, list):
            input_tensor = input_tensor[0]
        self.decoder.set_input_tensor(input_tensor)

    def forward(
        self,
        tokens: Tensor,
        layout: BlockLayout,
        *,
        noisy_copies: int,
        clean: bool,
        rows: Tensor | None = None,
    ) -> ParallelVocabView | Tensor:
        """Run the streams.

        Args:
            tokens: ids of all streams, int64 [batch, streams * seq], as ``assemble_streams`` lays them.
            layout: blocks and documents of the rows, [batch, seq].
            noisy_copies: number C of noisy streams.
            clean: whether the clean stream follows them.
            rows: which positions of the output streams need logits, bool [batch, out, seq]; out is C, or 1
                when C = 0.

        Returns:
            On the last pipeline stage the logits of the rows, in row-major order of ``rows``, as a lazy view;
            without ``rows`` the normed hidden states of the output streams, [batch, out, seq, hidden]. On
            earlier stages the hidden states for the next one, [streams * seq / chunks, batch, hidden].

        Raises:
            ShapeError: if the shapes do not belong together.
        """
        batch, seq = layout.shape
        streams = noisy_copies + int(clean)
        out = noisy_copies or 1
        if streams < 1 or tuple(tokens.shape) != (batch, streams * seq):
            raise ShapeError(
                f"tokens has shape {tuple(tokens.shape)}; noisy_copies={noisy_copies}, clean={clean} and a "
                f"layout of {batch} rows of {seq} need [{batch}, {streams * seq}] and at least one stream"
            )
        if rows is not None and tuple(rows.shape) != (batch, out, seq):
            raise ShapeError(
                f"rows has shape {tuple(rows.shape)}; it must be [batch, out, seq] = [{batch}, {out}, {seq}]"
            )
        if seq % self.chunks:
            raise ShapeError(
                f"{self.chunks} ranks do not divide the {seq} tokens of a row between them; choose a "
                f"seq_len that is a multiple of {self.chunks}, or sequence_parallel=False"
            )
        tokens = to_chunks(tokens, chunks=self.chunks, seq=seq, dim=1)
        hidden = self.run_layers(tokens, self._stream_context(layout, noisy_copies, clean))
        if not self.post_process:
            return hidden
        hidden = self._gather_rows(hidden, seq)
        if rows is None:
            return self.final_layernorm(hidden).unflatten(0, (out, seq)).permute(2, 0, 1, 3)
        return self.view_rows(hidden, rows.flatten(1))

    def run_layers(self, tokens: Tensor, context: AttentionContext) -> Tensor:
        """Embedding and layers.

        Args:
            tokens: int64 [batch, rows], chunk after chunk where ranks split them.
            context: what attention needs to know.

        Returns:
            [output rows of this rank, batch, hidden], before the final norm.
        """
        hidden = self.embedding(tokens) if self.pre_process else None
        states: Tensor = self.decoder(hidden, None, attention_bias=context)
        return states

    def view_rows(self, hidden: Tensor, rows: Tensor) -> ParallelVocabView:
        """Final norm and head of some rows.

        Args:
            hidden: [seq, batch, hidden].
            rows: bool [batch, seq].

        Returns:
            The rows in row-major order of ``rows``.
        """
        batch = hidden.shape[1]
        row, position = rows.nonzero(as_tuple=True)
        picked = hidden.flatten(0, 1).index_select(0, position * batch + row)
        return ParallelVocabView(self.final_layernorm(picked), self.output_layer)

    def _gather_rows(self, hidden: Tensor, seq: int) -> Tensor:
        """Rows of all ranks, stream after stream; every rank computes the same with them from here on."""
        if self.chunks == 1:
            return hidden
        # Hence no sum over ranks in backward: each gets the whole gradient and keeps its rows of it.
        gathered = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
        )
        return to_streams(gathered, chunks=self.chunks, seq=seq)

    def rope_table(self, positions: Tensor) -> RopeTable:
        """Angles of positions, int64 [seq] or [seq, batch]."""
        config = self.config
        return make_rope_table(
            positions,
            config.kv_channels,
            base=config.rope_base,
            angle_dtype=config.angle_dtype,
            dtype=config.params_dtype,
        )

    def _stream_context(self, layout: BlockLayout, noisy_copies: int, clean: bool) -> StreamContext:
        seq = layout.shape[1]
        positions = torch.arange(seq, device=layout.block_start.device).repeat(noisy_copies + int(clean))
        backend = self.config.block_attention_backend
        return StreamContext(
            layout=prepare(
                layout,
                noisy_copies=noisy_copies,
                clean=clean,
                backend=backend,
                head_dim=self.config.kv_channels,
                dtype=self.config.params_dtype,
            ),
            rope=self.rope_table(positions),
            seq=seq,
            noisy_copies=noisy_copies,
            clean=clean,
            backend=backend,
            chunks=self.chunks,
        )


def assemble_streams(noisy: Tensor | None, clean: Tensor | None) -> Tensor:
    """Lay the streams end to end: noisy_1 .. noisy_C, clean.

    Args:
        noisy: noised ids, int64 [batch, copies, seq], or None.
        clean: clean ids, int64 [batch, seq], or None.

    Returns:
        [batch, streams * seq].

    Raises:
        ShapeError: if there is no stream or the shapes differ.
    """
    parts = ([] if noisy is None else [noisy]) + ([] if clean is None else [clean.unsqueeze(1)])
    if not parts:
        raise ShapeError("neither a noisy nor a clean stream was given; at least one is needed")
    batch, _, seq = parts[0].shape
    if any(part.shape[0] != batch or part.shape[2] != seq for part in parts):
        raise ShapeError(
            f"streams of shapes {[tuple(part.shape) for part in parts]} cannot be laid end to end; batch and "
            "seq must agree"
        )
    return torch.cat(parts, dim=1).flatten(1)
