"""Megatron's TransformerConfig made from ours: both shapes, and every flag whose default will not do."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from bdtrain.errors import ConfigError

if TYPE_CHECKING:
    from bdtrain.config import ModelConfig

SHAPES = ("qwen3", "bd3lm")


@dataclass
class BDTransformerConfig(TransformerConfig):
    """What the layers know of the model; made by ``build_transformer_config``.

    Attributes:
        shape: "qwen3" (RMSNorm, SwiGLU, grouped queries, per-head QK-norm, no biases) or "bd3lm" (LayerNorm
            with bias, tanh-GELU, biases in the MLP and the head).
        vocab_size: tokens of the vocabulary; a column at or past it is padding and never predicted.
        padded_vocab_size: rows of the embedding and of the head, a multiple of ``vocab_multiple`` whatever tp
            is.
        mask_id: the [MASK] token, never predicted.
        rope_base: base of the rotary angles.
        init_std: standard deviation of the initial weights.
        block_attention_backend: backend name given to ``bdtrain_kernels.block_attention``.
    """

    shape: str = "qwen3"
    vocab_size: int = 0
    padded_vocab_size: int = 0
    mask_id: int = 0
    rope_base: float = 10000.0
    init_std: float = 0.02
    block_attention_backend: str = "auto"

    @property
    def biased(self) -> bool:
        """Whether norms, MLP and head carry biases."""
        return self.shape == "bd3lm"

    @property
    def angle_dtype(self) -> torch.dtype:
        """Type of the rotary angles: float32 as in every engine, float64 for float64 weights."""
        return torch.float64 if self.params_dtype == torch.float64 else torch.float32


def padded_vocab_size(vocab_size: int, multiple: int) -> int:
    """``vocab_size`` rounded up to a multiple of ``multiple``."""
    return -(-vocab_size // multiple) * multiple


def build_transformer_config(
    model: ModelConfig,
    *,
    vocab_size: int,
    mask_id: int,
    dtype: torch.dtype = torch.float32,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    attention_backend: str | None = None,
    sequence_parallel: bool = False,
    recompute: str = "none",
    **overrides: Any,
) -> BDTransformerConfig:
    """Make Megatron's configuration.

    Args:
        model: the ``model`` section of the run configuration.
        vocab_size: tokens of the vocabulary, [MASK] included.
        mask_id: id of [MASK].
        dtype: type of the parameters.
        tensor_parallel: ranks that share each layer.
        pipeline_parallel: stages that share the layers.
        attention_backend: in place of ``model.attention_backend``.
        sequence_parallel: the ranks that share a layer split its rows, too, where each row is by itself.
        recompute: activations made again in backward: "none", "core_attn" or "full".
        **overrides: further fields of TransformerConfig (fusions on GPU).

    Raises:
        ConfigError: if the sizes do not fit each other.
    """
    padded = padded_vocab_size(vocab_size, model.vocab_multiple)
    problems = _find_problems(model, vocab_size, mask_id, padded, tensor_parallel)
    if recompute not in _RECOMPUTATION:
        problems.append(f"recompute={recompute!r} does not exist; choose {' or '.join(_RECOMPUTATION)}")
    if sequence_parallel and tensor_parallel == 1:
        problems.append(
            "sequence_parallel=true splits rows between the ranks of tp, and tp=1 would ignore it; set it to "
            "false or tp to 2 or more"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    biased = model.shape == "bd3lm"
    settings: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads,
        "kv_channels": model.head_dim,
        "ffn_hidden_size": model.ffn_size,
        "layernorm_epsilon": model.norm_epsilon,
        "normalization": "LayerNorm" if biased else "RMSNorm",
        "add_bias_linear": biased,
        "gated_linear_unit": not biased,
        "activation_func": gelu_tanh if biased else F.silu,
        # Whatever its name, it lets the MLP take an activation from the layer's spec: ours.
        "use_te_activation_func": not biased,
        "qk_layernorm": not biased,
        "init_method": leave_unset,
        "output_layer_init_method": leave_unset,
        "init_method_std": model.init_std,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": pipeline_parallel,
        "sequence_parallel": sequence_parallel,
        "shape": model.shape,
        "vocab_size": vocab_size,
        "padded_vocab_size": padded,
        "mask_id": mask_id,
        "rope_base": model.rope_base,
        "init_std": model.init_std,
        "block_attention_backend": attention_backend or model.attention_backend,
        **_FLAGS,
        **_RECOMPUTATION[recompute],
    }
    if getattr(TransformerConfig, "cuda_graph_scope", None) == "full":
        settings["cuda_graph_scope"] = []  # the default of 0.16 warns of itself
    with warnings.catch_warnings():
        # Recomputed attention makes it wonder whether that is Transformer Engine's; it is ours.
        warnings.filterwarnings("ignore", message="If you are using transformer_engine")
        return BDTransformerConfig(**{**settings, **overrides})


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh form of GELU."""
    return F.gelu(x, approximate="tanh")


def leave_unset(weight: Tensor) -> None:
    """Megatron's initialiser in our models: nothing, since ``bdtrain.model.init`` writes every parameter.

    It is called all the same (``perform_initialization=True``), since Megatron marks the split parameters
    there.
    """


# Every flag below must hold; the reason stands beside those that are not plain "off".
_FLAGS: dict[str, Any] = {
    "use_cpu_initialization": True,
    "perform_initialization": True,
    # A stateful generator would make a step depend on the layout.
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    # The extension that fuses it is not installed.
    "gradient_accumulation_fusion": False,
    # torch.compile, seconds for the first step of a CPU; off everywhere until measured on a GPU.
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    # Plain isend/irecv, which gloo has.
    "batch_p2p_comm": False,
    "batch_p2p_sync": False,
    "overlap_p2p_comm": False,
    # The objective divides by the global count of tokens, the schedule by nothing.
    "calculate_per_token_loss": True,
}

_RECOMPUTATION: dict[str, dict[str, Any]] = {
    "none": {},
    "core_attn": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
"""What is made again in backward, in Megatron's words."""


def _find_problems(model: ModelConfig, vocab_size: int, mask_id: int, padded: int, tp: int) -> list[str]:
    """What does not fit, one line each."""
    heads, kv_heads = model.num_heads, model.num_kv_heads
    tp_choices = [n for n in range(1, kv_heads + 1) if heads % n == 0 and kv_heads % n == 0]
    checks = [
        (model.shape in SHAPES, f"model.shape={model.shape!r} does not exist; choose {' or '.join(SHAPES)}"),
        (
            model.head_dim % 2 == 0,
            f"head_dim={model.head_dim} is odd; rotary positions turn pairs, choose an even model.head_dim",
        ),
        (
            heads % kv_heads == 0,
            f"num_kv_heads={kv_heads} does not divide num_heads={heads}; choose a divisor",
        ),
        (
            model.shape != "bd3lm" or kv_heads == heads,
            f"model.shape=bd3lm has a key head per query head, not {kv_heads}; unset num_kv_heads",
        ),
        (
            0 <= mask_id < vocab_size,
            f"mask_id={mask_id} is outside the vocabulary of {vocab_size}; take both from one tokenizer",
        ),
        (
            heads % tp == 0 and kv_heads % tp == 0,
            f"tp={tp} does not divide num_heads={heads} and num_kv_heads={kv_heads}; choose tp from "
            f"{', '.join(map(str, tp_choices))}",
        ),
        (
            padded % tp == 0,
            f"tp={tp} does not divide the padded vocabulary of {padded}; make vocab_multiple a multiple "
            f"of {tp}",
        ),
    ]
    return [message for holds, message in checks if not holds]
