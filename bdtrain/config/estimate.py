"""Sizes of a run by arithmetic alone: parameters, tokens and memory, without building anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bdtrain.config.schema import ModelConfig, RunConfig

FP32_BYTES = 4
WEIGHT_BYTES: Mapping[str, int] = MappingProxyType({"fp32": 4, "bf16": 2})


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
