"""Our qwen3 shape as transformers' Qwen3ForCausalLM, both ways: names, weights and config.json.

Stock transformers loads the result without our package and without remote code. Qwen3 knows nothing of
blocks: give it an explicit 4-D mask. The engines that decode block diffusion read the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bdtrain.errors import CheckpointError
from bdtrain.export.fused_weights import fuse_qkv, pad_rows, split_qkv

if TYPE_CHECKING:
    from bdtrain.config import ModelConfig

_WHOLE = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_VOCABULARY = ("embedding.weight", "output_layer.weight")
_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


def to_qwen3(state: Mapping[str, Tensor], model: ModelConfig, *, vocab_size: int) -> dict[str, Tensor]:
    """Weights by the names of Qwen3ForCausalLM.

    Args:
        state: from ``bdtrain.model.weights.full_state``.
        model: the ``model`` section; its shape must be qwen3.
        vocab_size: tokens of the vocabulary; padding rows are dropped. The row of [MASK] stays: its input
            embedding is used, its logit must be ignored by whoever decodes.

    Raises:
        CheckpointError: if the model has another shape.
    """
    _require_qwen3(model)
    out = {theirs: state[ours] for ours, theirs in _WHOLE.items()}
    for ours in _VOCABULARY:
        out[_WHOLE[ours]] = out[_WHOLE[ours]][:vocab_size].contiguous()
    for layer in range(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for name, their_name in _LAYER.items():
            out[theirs + their_name] = state[ours + name]
        parts = split_qkv(
            state[ours + "self_attention.linear_qkv.weight"],
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
        )
        for letter, part in zip("qkv", parts, strict=True):
            out[f"{theirs}self_attn.{letter}_proj.weight"] = part.contiguous()
        gate, up = state[ours + "mlp.linear_fc1.weight"].chunk(2)
        out[theirs + "mlp.gate_proj.weight"] = gate.contiguous()
        out[theirs + "mlp.up_proj.weight"] = up.contiguous()
    return out


def from_qwen3(
    state: Mapping[str, Tensor], model: ModelConfig, *, padded_vocab_size: int
) -> dict[str, Tensor]:
    """The inverse of ``to_qwen3``; also loads published Qwen3 weights.

    Args:
        state: by transformers' names; without ``lm_head.weight`` the embedding is taken (tied weights).
        model: the ``model`` section of the model to load into.
        padded_vocab_size: rows of its embedding; what is missing is filled with zeros.

    Raises:
        CheckpointError: if a name is missing or left over, or the vocabulary does not fit.
    """
    _require_qwen3(model)
    left = dict(state)
    left.setdefault("lm_head.weight", state.get("model.embed_tokens.weight", torch.empty(0)))
    missing: list[str] = []

    def take(name: str) -> Tensor:
        if name not in left:
            missing.append(name)
            return torch.zeros(model.num_kv_heads * 2)
        return left.pop(name)

    out = {ours: take(theirs) for ours, theirs in _WHOLE.items()}
    for layer in range(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        out.update({ours + name: take(theirs + their_name) for name, their_name in _LAYER.items()})
        query, key, value = (take(f"{theirs}self_attn.{letter}_proj.weight") for letter in "qkv")
        gate, up = take(theirs + "mlp.gate_proj.weight"), take(theirs + "mlp.up_proj.weight")
        if not missing:
            out[ours + "self_attention.linear_qkv.weight"] = fuse_qkv(
                query, key, value, num_kv_heads=model.num_kv_heads
            )
            out[ours + "mlp.linear_fc1.weight"] = torch.cat((gate, up))
    rows = out["embedding.weight"].shape[0]
    problems = [f"missing: {name}" for name in missing] + [f"unknown: {name}" for name in left]
    if not missing and rows > padded_vocab_size:
        problems.append(
            f"the vocabulary has {rows} rows, the model {padded_vocab_size}; set model.vocab_size"
        )
    if problems:
        raise CheckpointError(
            "these are not the weights of this Qwen3 model:\n  " + "\n  ".join(problems[:12])
        )
    for name in _VOCABULARY:
        out[name] = pad_rows(out[name], padded_vocab_size)
    return out


def qwen3_config(
    model: ModelConfig,
    *,
    vocab_size: int,
    seq_len: int,
    block_size: int,
    mask_id: int,
    pad_id: int | None = None,
    bos_id: int | None = None,
    eos_id: int | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Content of config.json.

    Beside transformers' own keys it has the ones that inference engines read from the top level
    (``rope_theta``) and the ones a block decoder needs (``block_size``, ``mask_token_id``).
    """
    _require_qwen3(model)
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "max_position_embeddings": seq_len,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "initializer_range": model.init_std,
        "pad_token_id": pad_id,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
        "block_size": block_size,
        "mask_token_id": mask_id,
    }


def _require_qwen3(model: ModelConfig) -> None:
    if model.shape != "qwen3":
        raise CheckpointError(
            f"model.shape={model.shape!r} has no Qwen3 form; only model.shape=qwen3 can be exchanged"
        )
