"""Sizes of a run by arithmetic alone: parameters, memory, disk and operations, without building anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bdtrain.config.schema import ModelConfig, RunConfig

FP32_BYTES = 4
WEIGHT_BYTES: Mapping[str, int] = MappingProxyType({"fp32": 4, "bf16": 2})


TRITON_HEAD_DIMS = range(16, 257, 8)
"""Channels of a head that the Triton attention has. Said here again: the kernels' package imports torch."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model.

    Attributes:
        layers: all layers and the final norm; what papers call non-embedding parameters.
        embedding: token embedding and head (they are separate matrices), padding rows included.
    """

    layers: int
    embedding: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.layers + self.embedding


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory that one rank holds from step to step.

    Activations, buffers of communication and the copy of the gradients that an update works on come on top.

    Attributes:
        weights_bytes: weights in the precision of the run.
        gradients_bytes: the sum of gradients, fp32.
        optimizer_bytes: fp32 weights, both moments, and the averaged weights where they are kept.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        """All parts."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class StepOperations:
    """Floating-point operations of an optimizer step, over all ranks; a multiplication and an addition are 2.

    Attributes:
        linear: projections and feed-forward parts of all layers.
        attention: scores and their sums over values, for every pair that the dense form computes.
        head: output head on the rows that have a loss; 0 where the vocabulary is not known.
    """

    linear: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.attention + self.head


def known_vocab_size(config: RunConfig) -> int | None:
    """Tokens of the vocabulary before padding, None where only the corpus knows."""
    if config.model.vocab_size is None and config.data.kind == "synthetic":
        return config.data.synthetic_vocab_size
    return config.model.vocab_size


def padded_vocab_size(model: ModelConfig, vocab_size: int) -> int:
    """Rows of the embedding and of the head."""
    return -(-vocab_size // model.vocab_multiple) * model.vocab_multiple


def count_parameters(model: ModelConfig, vocab_size: int) -> ParameterCount:
    """Parameters of a model, exactly.

    Args:
        model: its shape.
        vocab_size: tokens before padding; takes the place of ``model.vocab_size``.
    """
    layer, final_norm = _layer_parameters(model, tp=1), _final_norm_parameters(model)
    embedding, head = _vocabulary_parameters(model, vocab_size, tp=1)
    return ParameterCount(layers=model.num_layers * layer + final_norm, embedding=embedding + head)


def count_local_parameters(model: ModelConfig, vocab_size: int | None, *, tp: int, pp: int) -> int:
    """Parameters of the rank that holds most of them, the first or the last pipeline stage.

    Args:
        model: its shape; tp and pp divide what they must.
        vocab_size: tokens before padding; None leaves embedding and head out.
        tp: ranks that share each layer.
        pp: stages that share the layers.
    """
    layers = model.num_layers // pp * _layer_parameters(model, tp=tp)
    embedding, head = (0, 0) if vocab_size is None else _vocabulary_parameters(model, vocab_size, tp=tp)
    tail = head + _final_norm_parameters(model)
    return layers + (embedding + tail if pp == 1 else max(embedding, tail))


def estimate_memory(
    parameters: int, *, precision: str, zero_stage: int, dp: int, averaged: bool
) -> MemoryEstimate:
    """Memory of one rank, by the parts that ZeRO divides over the data-parallel ranks.

    Args:
        parameters: of the rank, see ``count_local_parameters``.
        precision: fp32 or bf16.
        zero_stage: 1 divides the optimizer's state, 2 also gradients, 3 also weights.
        dp: data-parallel ranks.
        averaged: whether an average of the weights is kept (``optim.ema_decay``).
    """
    share = -(-parameters // dp)
    # A copy of the weights that the optimizer updates (ZeRO keeps it in fp32 runs too) and Adam's moments.
    state_bytes = (1 + 2 + averaged) * FP32_BYTES
    return MemoryEstimate(
        weights_bytes=(share if zero_stage >= 3 else parameters) * WEIGHT_BYTES[precision],
        gradients_bytes=(share if zero_stage >= 2 else parameters) * FP32_BYTES,
        optimizer_bytes=share * state_bytes,
    )


def checkpoint_bytes(parameters: int, *, averaged: bool) -> int:
    """Size of a training checkpoint on disk, over all its files.

    Args:
        parameters: of the whole model.
        averaged: whether an average of the weights is kept.
    """
    return parameters * (1 + 2 + averaged) * FP32_BYTES


def count_streams(config: RunConfig) -> tuple[int, int]:
    """Noisy copies, and clean streams (0 or 1), of a forward pass."""
    algo = config.diffusion.algo
    return (0 if algo == "ar" else config.diffusion.noise_copies), int(algo != "mdlm")


def masked_share(config: RunConfig) -> float:
    """Share of the tokens of a noisy copy that reach the head, on average; 1 for ``ar``."""
    if config.diffusion.algo == "ar":
        return 1.0
    # A linear schedule draws the probability evenly over the range; the others come near enough.
    clip_range = config.diffusion.plan.clip_range or (0.0, 1.0)
    return sum(clip_range) / 2


def counted_attention(config: RunConfig) -> str:
    """The attention that a GPU runs, as far as it is counted: "triton" or "dense" (``activations``).

    Args:
        config: the run.
    """
    model = config.model
    if model.attention_backend == "auto":
        return "triton" if needs_mask(config) and model.head_dim in TRITON_HEAD_DIMS else "dense"
    return "triton" if model.attention_backend == "triton" else "dense"


def needs_mask(config: RunConfig) -> bool:
    """Whether dense attention needs a mask: not over one block, nor for the causal triangle.

    Args:
        config: the run.
    """
    noisy, clean = count_streams(config)
    return config.data.documents == "isolate" or bool(noisy and clean)


def estimate_step_operations(config: RunConfig) -> StepOperations:
    """Operations that an optimizer step executes: what time on a GPU is estimated from.

    Per row of every stream each matrix of a layer once, in the last layer for the clean stream only keys and
    values; backward twice the forward pass. Unlike ``bdtrain.model.flops``, which counts what the model needs
    (MFU), this has what ``train.recompute`` makes a second time, and of attention what is computed and thrown
    away. Dense: the pairs under the mask (all of them for ``ar`` too, where a causal kernel does half).
    Triton: the products that its backward makes twice, 7 for a pair where the forward pass makes 2; not the
    hidden pairs of its ragged tiles (3% to 6% at 4096 tokens), and documents count as one.
    """
    model, seq = config.model, config.data.seq_len
    noisy, clean = count_streams(config)
    tokens = config.tokens_per_step
    queries, keys_values = model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim
    feed_forward = (3 if model.shape == "qwen3" else 2) * model.hidden_size * model.ffn_size
    row = 2 * (model.hidden_size * (2 * queries + keys_values) + feed_forward)
    unread = clean if noisy else 0  # streams that only give keys and values in the last layer
    last = (noisy + clean - unread) * row + unread * 2 * model.hidden_size * keys_values
    linear = tokens * ((noisy + clean) * row * (model.num_layers - 1) + last)
    dense = counted_attention(config) == "dense"
    seen = (seq + config.diffusion.block_size) / 2  # own block and all before it, on average over a row
    noisy_keys, clean_keys = (
        (noisy * (1 + clean) * seq, clean * seq) if dense else (noisy * seen, clean * seen)
    )
    last_keys = noisy_keys if noisy else clean_keys
    keys = (noisy_keys + clean_keys) * (model.num_layers - 1) + last_keys
    attention = tokens * 2 * 2 * queries * keys
    picked = int(tokens * (noisy or 1) * masked_share(config))
    recompute = config.train.recompute
    return StepOperations(
        linear=linear * (4 if recompute == "full" else 3),
        attention=int(attention * ((3 if dense else 4.5) + (recompute != "none"))),
        head=3 * 2 * picked * model.hidden_size * (known_vocab_size(config) or 0),
    )


def _layer_parameters(model: ModelConfig, *, tp: int) -> int:
    """Parameters of one layer on one tensor-parallel rank: matrices are cut, norms are not."""
    hidden, ffn = model.hidden_size, model.ffn_size // tp
    queries, keys = model.num_heads * model.head_dim // tp, model.num_kv_heads * model.head_dim // tp
    # No biases in attention in either shape.
    attention = hidden * (queries + 2 * keys) + queries * hidden
    if model.shape == "bd3lm":
        # The bias of the second matrix is added after the ranks' parts are summed: every rank has it whole.
        return attention + 4 * hidden + 2 * hidden * ffn + ffn + hidden
    return attention + 2 * hidden + 2 * model.head_dim + 3 * hidden * ffn


def _final_norm_parameters(model: ModelConfig) -> int:
    return (2 if model.shape == "bd3lm" else 1) * model.hidden_size


def _vocabulary_parameters(model: ModelConfig, vocab_size: int, *, tp: int) -> tuple[int, int]:
    """Parameters of the embedding and of the head on one tensor-parallel rank."""
    rows = padded_vocab_size(model, vocab_size) // tp
    return rows * model.hidden_size, rows * model.hidden_size + (rows if model.shape == "bd3lm" else 0)
