"""Memory of activations by arithmetic: what autograd keeps between a forward and its backward pass.

Rows of the sequence axis are R = streams x seq_len x micro_batch_size: every noisy copy and the clean stream
pass through all layers. One layer keeps, per row, in the precision of the run (h hidden_size; q and k the
channels of all query and of all key heads; f ffn_size; tp divides q, k and f, and h too under sequence
parallelism; n is 3 with a gate in the feed-forward part, else 2):

    4 h                 input and result of both norms
    q + 2 k             the joint projection, as the values and the norms of queries and keys read it
    q + k               queries and keys as attention reads them, turned
    q                   the result of attention, which the output projection reads
    n f                 the feed-forward part: result of the first projection, input of the second

and besides, in float32, what norms keep per row and the logarithms of attention's sums. That is all with the
Triton kernels (``model.attention_backend=triton``). Sequence parallelism reorders the rows of the result: q
more. Dense attention keeps more:

    q                   its result has another order of axes than the output projection reads
    2 q - k             with grouped heads and a mask keys and values, repeated to the width of the queries
    2 q                 with several noisy copies, per row that a copy attends to: its own and the clean keys
                        and values, joined

and its mask as numbers, [seq, 2 seq] for every noisy copy and [seq, seq] for the clean stream: once where a
row is one document, else for each row of the micro-batch.

``auto`` is counted as what it is on a GPU: the Triton kernels, or dense attention where no mask is needed
(``mdlm`` and ``ar`` over whole rows) or the kernels do not have the head size. Every other choice is counted
as dense. On a CPU ``auto`` takes dense attention or the tree; ``model.attention_backend=dense`` gives the
count for that.

``train.recompute=core_attn`` drops what is inside attention (repeated keys and values, its own result, sums
and masks), ``full`` all but the layer's input; one layer at a time is then made again in backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from bdtrain.config.estimate import (
    FP32_BYTES,
    WEIGHT_BYTES,
    count_streams,
    counted_attention,
    known_vocab_size,
    masked_share,
    needs_mask,
    padded_vocab_size,
)
from bdtrain.config.layout import Layout
from bdtrain.config.schema import RunConfig

CHUNK_BYTES = 256 << 20
"""Logits of the head that exist at a time on a GPU (``bdtrain_kernels.masked_cross_entropy``)."""

LEAST_CHUNK_ROWS = 64
"""Rows of such a chunk, however large the vocabulary is."""


@dataclass(frozen=True)
class ActivationEstimate:
    """Activations of the pipeline stage that holds most of them, at the start of a backward pass.

    Attributes:
        micro_batches: forward passes whose activations the stage holds at once.
        layers_bytes: of its layers, over those micro-batches.
        head_bytes: of final norm, head and loss; 0 on a stage without a head, and where the vocabulary is not
            known.
    """

    micro_batches: int
    layers_bytes: int
    head_bytes: int

    @property
    def total_bytes(self) -> int:
        """All parts."""
        return self.layers_bytes + self.head_bytes


def estimate_activations(config: RunConfig, layout: Layout) -> ActivationEstimate:
    """Activations of one rank, by the formula of this module.

    Args:
        config: the run.
        layout: its cut over the ranks.

    Returns:
        The larger of the first stage, which runs ahead by as many micro-batches as there are stages (1F1B),
        and the last one, which has the head.
    """
    layers = config.model.num_layers // layout.pp
    kept, again = _layer_bytes(config, layout)
    ahead = min(layout.pp, layout.micro_batches)
    head = _head_bytes(config, layout)
    last = ActivationEstimate(1, layers * kept + again, head)
    first = ActivationEstimate(ahead, ahead * layers * kept + again, head if layout.pp == 1 else 0)
    return max(first, last, key=lambda stage: stage.total_bytes)


def _layer_bytes(config: RunConfig, layout: Layout) -> tuple[int, int]:
    """Bytes that a layer keeps of a micro-batch, and those made again for one layer at a time in backward."""
    model = config.model
    gated = model.shape == "qwen3"
    queries = model.num_heads * model.head_dim // layout.tp
    keys = model.num_kv_heads * model.head_dim // layout.tp
    dense = counted_attention(config) == "dense"
    repeated = dense and model.num_heads > model.num_kv_heads and needs_mask(config)
    residual = model.hidden_size // (layout.tp if config.parallel.sequence_parallel else 1)
    size = WEIGHT_BYTES[config.train.precision]
    noisy, clean = count_streams(config)
    rows = (noisy + clean) * config.data.seq_len * layout.micro_batch_size

    # per row, in numbers of the run's precision
    norms, projected, mixed = 4 * residual, queries + 2 * keys, queries
    feed_forward = (3 if gated else 2) * (model.ffn_size // layout.tp)
    outside = norms + projected + queries + keys + mixed + feed_forward
    inside = queries + (2 * queries - keys if repeated else 0)
    # per row, float32
    heads, key_heads = model.num_heads // layout.tp, model.num_kv_heads // layout.tp
    statistics = 2 + heads + key_heads if gated else 2 * 2
    outside_bytes = rows * (size * outside + FP32_BYTES * statistics)
    inside_bytes = rows * (size * inside + FP32_BYTES * heads)
    if dense:
        inside_bytes += size * _mask_numbers(config, layout)
    if dense and noisy > 1 and clean:
        # Each copy joins its keys and values with those of the clean stream.
        joined = noisy * (1 + clean) * config.data.seq_len * layout.micro_batch_size
        inside_bytes += joined * 2 * queries * size
    reordered = config.parallel.sequence_parallel and layout.tp > 1 and noisy + clean > 1
    # The result of the Triton kernels lies as the output projection reads it: one memory, twice above.
    shared_bytes = 0 if dense or reordered else rows * size * queries

    if config.train.recompute == "full":
        input_bytes = rows * residual * size
        return input_bytes, outside_bytes + inside_bytes - shared_bytes - input_bytes
    if config.train.recompute == "core_attn":
        return outside_bytes, inside_bytes
    return outside_bytes + inside_bytes - shared_bytes, 0


def _mask_numbers(config: RunConfig, layout: Layout) -> int:
    """Numbers in the masks of one layer."""
    if not needs_mask(config):
        return 0
    noisy, clean = count_streams(config)
    seq, isolated = config.data.seq_len, config.data.documents == "isolate"
    each = noisy * seq * (1 + clean) * seq + clean * seq * seq
    return each * (layout.micro_batch_size if isolated else 1)


def _head_bytes(config: RunConfig, layout: Layout) -> int:
    """Final norm, head and loss of the rows that have one."""
    vocab, model = known_vocab_size(config), config.model
    if vocab is None:
        return 0
    size = WEIGHT_BYTES[config.train.precision]
    noisy = count_streams(config)[0] or 1
    picked = int(noisy * config.data.seq_len * layout.micro_batch_size * masked_share(config))
    local = padded_vocab_size(model, vocab) // layout.tp
    # The rows that have a loss and their norm; made in the forward pass with the loss: gradients of the rows
    # in the run's precision, and the sum of the weight's in float32.
    rows, weight = picked * model.hidden_size, local * model.hidden_size
    kept = 2 * rows * size + rows * size + weight * FP32_BYTES
    chunk = min(picked, max(LEAST_CHUNK_ROWS, CHUNK_BYTES // (local * size))) * local * size
    scaled = rows * (FP32_BYTES + size)
    rounded = rows * size + (weight * size if size < FP32_BYTES else 0)
    # One after the other: logits of a chunk; gradients of the rows times what arrives; the weight's, rounded.
    return kept + max(chunk, scaled, rounded)
