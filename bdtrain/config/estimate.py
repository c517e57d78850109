"""Sizes of a run by arithmetic alone: parameters and tokens, without building anything."""

from __future__ import annotations

from dataclasses import dataclass

from bdtrain.config.schema import ModelConfig


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


def count_parameters(model: ModelConfig, vocab_size: int) -> ParameterCount:
    """Parameters of a model, exactly.

    Args:
        model: its shape.
        vocab_size: tokens before padding; takes the place of ``model.vocab_size``.
    """
    hidden, ffn = model.hidden_size, model.ffn_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    # No biases in attention in either shape.
    attention = hidden * (queries + 2 * keys) + queries * hidden
    if model.shape == "bd3lm":
        norms, final_norm = 4 * hidden, 2 * hidden
        feed_forward = 2 * hidden * ffn + ffn + hidden
    else:
        norms, final_norm = 2 * hidden + 2 * model.head_dim, hidden
        feed_forward = 3 * hidden * ffn
    padded = -(-vocab_size // model.vocab_multiple) * model.vocab_multiple
    head_bias = padded if model.shape == "bd3lm" else 0
    return ParameterCount(
        layers=model.num_layers * (attention + norms + feed_forward) + final_norm,
        embedding=2 * padded * hidden + head_bias,
    )
