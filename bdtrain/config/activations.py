"""Memory of activations by arithmetic: what autograd keeps between a forward and its backward pass.

Rows of the sequence axis are R = streams x seq_len x micro_batch_size: every noisy copy and the clean stream
pass through all layers. One layer keeps, per row, in the precision of the run (h hidden_size; q and k the
channels of all query and of all key heads; f ffn_size; tp divides q, k and f, and h too under sequence
parallelism; n is 3 with a gate in the feed-forward part, else 2):

    4 h                 input and result of both norms
    q + 2 k             the joint projection, as the values and the norms of queries and keys read it
    3 q, or q + k       queries, keys and values as attention reads them: with grouped heads keys and values
                        are repeated to the width of the queries
    2 q                 the result of attention, by itself and as the output projection reads it
    n f                 the feed-forward part: result of the first projection, input of the second

and besides, in float32, what norms keep per row and the logarithms of attention's sums, and attention's mask
as numbers, [seq, 2 seq] for every noisy copy and [seq, seq] for the clean stream: once where a row is one
document, else for each row of the micro-batch. This is the dense attention that runs on a GPU.

``train.recompute=core_attn`` drops what is inside attention (repeated keys and values, its own result, sums
and masks), ``full`` all but the layer's input; one layer at a time is then made again in backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from bdtrain.config.estimate import (
    FP32_BYTES,
    WEIGHT_BYTES,
    count_streams,
    known_vocab_size,
    masked_share,
    padded_vocab_size,
)
from bdtrain.config.layout import Layout
from bdtrain.config.schema import RunConfig

LOGIT_FLOATS = 4
"""float32 numbers per logit when backward starts and tp is above 1: the exponentials, three gradients."""


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
    grouped = model.num_heads > model.num_kv_heads
    residual = model.hidden_size // (layout.tp if config.parallel.sequence_parallel else 1)
    size = WEIGHT_BYTES[config.train.precision]
    rows = sum(count_streams(config)) * config.data.seq_len * layout.micro_batch_size

    # per row, in numbers of the run's precision
    norms, projected, mixed = 4 * residual, queries + 2 * keys, queries
    feed_forward = (3 if gated else 2) * (model.ffn_size // layout.tp)
    outside = norms + projected + queries + keys + mixed + feed_forward
    inside = queries + (2 * queries - keys if grouped else 0)
    # per row, float32
    heads, key_heads = model.num_heads // layout.tp, model.num_kv_heads // layout.tp
    statistics = 2 + heads + key_heads if gated else 2 * 2
    outside_bytes = rows * (size * outside + FP32_BYTES * statistics)
    inside_bytes = rows * (size * inside + FP32_BYTES * heads) + size * _mask_numbers(config, layout)
    noisy, clean = count_streams(config)
    if noisy > 1 and clean:
        # Each copy joins its keys and values with those of the clean stream.
        joined = noisy * (1 + clean) * config.data.seq_len * layout.micro_batch_size
        inside_bytes += joined * 2 * queries * size

    if config.train.recompute == "full":
        input_bytes = rows * residual * size
        return input_bytes, outside_bytes + inside_bytes - input_bytes
    if config.train.recompute == "core_attn":
        return outside_bytes, inside_bytes
    return outside_bytes + inside_bytes, 0


def _mask_numbers(config: RunConfig, layout: Layout) -> int:
    """Numbers in the masks of one layer; what needs no mask has none."""
    noisy, clean = count_streams(config)
    seq, isolated = config.data.seq_len, config.data.documents == "isolate"
    if not isolated and not (noisy and clean):
        return 0  # one block, or the causal triangle
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
    kept = 2 * picked * model.hidden_size * size
    if layout.tp > 1:
        # All logits of the rank's part of the vocabulary, twice in the run's precision.
        return kept + picked * local * (LOGIT_FLOATS * FP32_BYTES + 2 * size)
    # Logits come in chunks; the gradients are made in float32 meanwhile, and once more when they are scaled.
    return (
        kept + picked * model.hidden_size * FP32_BYTES + local * model.hidden_size * (2 * FP32_BYTES + size)
    )
