"""Floating-point operations of a training step that serve the model: what MFU is measured by.

A multiplication and an addition count 2. Counted are the matrix products that a step needs:

* Per layer and row (of every stream): queries, keys and values; the output projection; the MLP. In the last
  layer the clean rows only need keys and values, since nothing reads them after it.
* The head on the rows that have a loss, over the real vocabulary.
* Attention by the pairs of query and key that see each other, 2 products of ``head_dim`` per pair and head. A
  noisy query sees its block and the clean tokens of its document before it; a clean query the clean tokens up
  to the end of its block.
* Backward twice as much as forward.

Not counted: pairs and padding that a kernel computes and throws away, recomputed activations, norms,
softmax, the embedding, the optimizer. So recomputation and a wasteful kernel lower the figure, as they
should.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bdtrain.diffusion.visibility import BlockLayout
from bdtrain.errors import ShapeError
from bdtrain.model.config import BDTransformerConfig

BACKWARD = 2
"""Products of a backward pass for one of the forward pass: gradients of the input and of the weight."""


@dataclass(frozen=True)
class StepFlops:
    """Operations of a training step, forward and backward.

    Attributes:
        linear: projections and MLPs of the layers.
        head: output head.
        attention: scores and their sums over values.
    """

    linear: int
    head: int
    attention: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.head + self.attention


def count_step_flops(
    config: BDTransformerConfig,
    *,
    rows: int,
    seq: int,
    noisy_copies: int,
    clean: bool,
    selected: int,
    pairs: int,
    last_layer_pairs: int,
) -> StepFlops:
    """Operations of a step of the whole model, over all ranks that share it.

    Every number is a sum over micro-batches and data-parallel ranks, as far as the result is to be one.

    Args:
        config: of the model (any object with Megatron's names for the sizes, ``gated_linear_unit`` and
            ``vocab_size``).
        rows: sequences of the batch.
        seq: tokens of a sequence.
        noisy_copies: noisy streams.
        clean: whether there is a clean stream.
        selected: rows of the output that have a loss.
        pairs: ``useful_pairs`` of all queries.
        last_layer_pairs: those of the queries of the last layer: ``queries="noisy"`` where there are noisy
            and clean streams.

    Raises:
        ShapeError: without a stream.
    """
    _check_streams(noisy_copies, clean)
    hidden, dim, layers = config.hidden_size, config.kv_channels, config.num_layers
    queries, keys_values = config.num_attention_heads * dim, 2 * config.num_query_groups * dim
    mlp = (3 if config.gated_linear_unit else 2) * hidden * config.ffn_hidden_size
    per_row = 2 * (hidden * (queries + keys_values) + queries * hidden + mlp)

    tokens = rows * seq
    every = tokens * (noisy_copies + int(clean))
    read = tokens * noisy_copies if noisy_copies else every  # rows that someone reads after the last layer
    linear = every * per_row * (layers - 1) + read * per_row + (every - read) * 2 * hidden * keys_values
    attention = 2 * 2 * queries * (pairs * (layers - 1) + last_layer_pairs)
    head = 2 * selected * hidden * config.vocab_size
    passes = 1 + BACKWARD
    return StepFlops(linear=passes * linear, head=passes * head, attention=passes * attention)


def useful_pairs(layout: BlockLayout, *, noisy_copies: int, clean: bool, queries: str = "all") -> int:
    """``count_pairs`` as a number; waits for the device of the layout."""
    return int(count_pairs(layout, noisy_copies=noisy_copies, clean=clean, queries=queries))


def count_pairs(layout: BlockLayout, *, noisy_copies: int, clean: bool, queries: str = "all") -> Tensor:
    """Pairs of query and key that see each other, over all rows of the batch; one head of one layer.

    Args:
        layout: blocks and documents, [batch, seq].
        noisy_copies: noisy streams.
        clean: whether there is a clean stream.
        queries: "all", or "noisy" for those of the noisy streams.

    Raises:
        ShapeError: without a stream or a query.

    Returns:
        int64, no dimension, on the device of the layout.
    """
    _check_streams(noisy_copies, clean)
    if queries not in ("all", "noisy") or (queries == "noisy" and not noisy_copies):
        raise ShapeError(
            f"queries={queries!r} with {noisy_copies} noisy streams; choose 'all', or 'noisy' of some"
        )
    start, end, document = (x.long().sum() for x in (layout.block_start, layout.block_end, layout.doc_start))
    # Sums of differences are differences of sums.
    pairs = noisy_copies * (end - (document if clean else start))
    if clean and queries == "all":
        pairs = pairs + (end - document)
    return pairs


def _check_streams(noisy_copies: int, clean: bool) -> None:
    if noisy_copies < 0 or (not noisy_copies and not clean):
        raise ShapeError(f"noisy_copies={noisy_copies}, clean={clean}: no stream; give at least one")
