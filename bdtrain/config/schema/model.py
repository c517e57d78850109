"""Section ``model``: the shape of the network."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from bdtrain.config.schema.fields import NO_UNIT, Int, Section, derived_int, setting

FFN_MULTIPLE = 64
"""A derived ``ffn_size`` is rounded up to this: friendly to tiles and to tensor parallelism."""


def _num_kv_heads(above: dict[str, Any]) -> int:
    return int(above["num_heads"])


def _head_dim(above: dict[str, Any]) -> int:
    return max(1, int(above["hidden_size"]) // int(above["num_heads"]))


def _ffn_size(above: dict[str, Any]) -> int:
    hidden = int(above["hidden_size"])
    if above["shape"] == "bd3lm":
        return 4 * hidden
    # Three matrices instead of two: 8/3 of the hidden size costs what 4 costs without the gate.
    return -(-(8 * hidden) // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE


class ModelConfig(Section):
    """Shape of the transformer; what is left null is derived from what is above it."""

    shape: Literal["qwen3", "bd3lm"] = setting(
        "qwen3",
        unit=NO_UNIT,
        description="Kind of layer. qwen3: RMSNorm, SwiGLU, grouped-query attention, per-head query/key "
        "norm, no biases. bd3lm: the published block diffusion network (LayerNorm, tanh-GELU, biases "
        "outside attention, multi-head attention).",
    )
    num_layers: Int = setting(unit="layers", description="Transformer layers.", ge=1)
    hidden_size: Int = setting(unit="channels", description="Width of the residual stream.", ge=1)
    num_heads: Int = setting(unit="heads", description="Query heads.", ge=1)
    num_kv_heads: Annotated[int, derived_int(_num_kv_heads)] = setting(
        None,
        unit="heads",
        description="Key and value heads; must divide num_heads. null means num_heads.",
        validate_default=True,
        ge=1,
    )
    head_dim: Annotated[int, derived_int(_head_dim)] = setting(
        None,
        unit="channels",
        description="Channels per head, even (rotary pairs). null means hidden_size / num_heads.",
        validate_default=True,
        ge=1,
    )
    ffn_size: Annotated[int, derived_int(_ffn_size)] = setting(
        None,
        unit="channels",
        description="Inner width of the feed-forward part. null means 8/3 of hidden_size rounded up to a "
        "multiple of 64 (qwen3) or 4 times hidden_size (bd3lm).",
        validate_default=True,
        ge=1,
    )
    vocab_size: Int | None = setting(
        None,
        unit="tokens",
        description="Tokens of the vocabulary before padding. null means what the corpus' tokenizer has.",
        ge=8,
    )
    vocab_multiple: Int = setting(
        128,
        unit="tokens",
        description="The embedding and the head are padded to a multiple of this; the padding rows are "
        "never predicted.",
        ge=1,
    )
    rope_base: float = setting(
        10000.0, unit=NO_UNIT, description="Base of the rotary position frequencies.", gt=1.0
    )
    norm_epsilon: float = setting(
        1e-6,
        unit=NO_UNIT,
        description="Epsilon inside every normalisation; published BD3-LM weights use 1e-5.",
        gt=0,
    )
    init_std: float = setting(
        0.02,
        unit=NO_UNIT,
        description="Standard deviation of the initial weights; projections into the residual stream are "
        "scaled down by the square root of twice num_layers.",
        gt=0,
    )
    attention_backend: Literal["auto", "triton", "tree", "flash", "flex", "dense"] = setting(
        "auto",
        unit=NO_UNIT,
        description="Attention path. auto picks by device and size and logs what it took. triton: our fused "
        "kernels (CUDA). tree: unmasked rectangles (CPU). flash: flash kernels of flash-attn or torch over "
        "the same rectangles. flex: FlexAttention (CUDA). dense: the plain masked form. One that is forced "
        "and cannot run is refused.",
    )
