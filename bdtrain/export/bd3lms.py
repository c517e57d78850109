"""Published BD3-LM and MDLM weights: constant adaLN folded into our bd3lm shape, and the way back.

Those networks modulate each norm and gate each branch with functions of sigma, the noise level. The released
models run without time conditioning, so sigma is a constant and the modulation too: with c =
silu(sigma_map(embed(sigma))),

    norm:  xhat * w * (1 + scale) + shift      ->  weight w * (1 + scale), bias shift
    gate:  gate * (W y + b)                    ->  weight diag(gate) W, bias gate * b

which is exact. Everything is plain tensor algebra, so gradients of a loss reach the reference's parameters
through it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from bdtrain.errors import CheckpointError
from bdtrain.export.fused_weights import fuse_qkv, pad_rows, split_qkv

PREFIX = "backbone."


def fold_bd3lms(
    state: Mapping[str, Tensor],
    *,
    num_heads: int,
    padded_vocab_size: int,
    sigma: float | Tensor = 0.0,
) -> dict[str, Tensor]:
    """Weights of our bd3lm shape from a published state dict.

    Args:
        state: by the published names, with or without the prefix ``backbone.``. Without modulation weights
            (the autoregressive baseline) the norms and branches are taken as they are.
        num_heads: attention heads, which the state dict does not tell.
        padded_vocab_size: rows of our embedding; padding is zero and never predicted.
        sigma: the constant that the network was conditioned on; 0 where time conditioning is off.

    Returns:
        By the names of ``bdtrain.model.weights.full_state``; load it with ``load_full_state`` into a model
        with norm_epsilon 1e-5.

    Raises:
        CheckpointError: if names are missing or left over.
    """
    source = _Source(state)
    condition = _condition(source, sigma) if source.has("sigma_map.mlp.0.weight") else None
    out = {"embedding.weight": pad_rows(source.take("vocab_embed.embedding"), padded_vocab_size)}
    layer = 0
    while source.has(f"blocks.{layer}.norm1.weight"):
        out.update(_fold_layer(source, layer, condition, num_heads))
        layer += 1
    shift, scale = _modulation(source, "output_layer.", condition, 2)
    weight, bias = _fold_norm(source.take("output_layer.norm_final.weight"), shift, scale)
    out["final_layernorm.weight"], out["final_layernorm.bias"] = weight, bias
    out["output_layer.weight"] = pad_rows(source.take("output_layer.linear.weight"), padded_vocab_size)
    out["output_layer.bias"] = pad_rows(source.take("output_layer.linear.bias"), padded_vocab_size)
    source.finish()
    return {name: value.to(source.dtype) for name, value in out.items()}


def unfold_bd3lms(
    state: Mapping[str, Tensor], *, num_heads: int, vocab_size: int, condition_size: int = 128
) -> dict[str, Tensor]:
    """A state dict by the published names that computes what ours does.

    The modulation's matrices are zero and its biases hold our norm biases and gates of 1, so that sigma has
    no effect.

    Args:
        state: from ``full_state`` of a bd3lm-shaped model.
        num_heads: attention heads.
        vocab_size: tokens of the vocabulary; padding rows are dropped.
        condition_size: width of the conditioning, ``cond_dim`` of the published configuration.
    """
    hidden = state["embedding.weight"].shape[1]
    like = state["embedding.weight"]
    ones, zeros = like.new_ones(hidden), like.new_zeros(hidden)
    out = {
        "vocab_embed.embedding": state["embedding.weight"][:vocab_size],
        "sigma_map.mlp.0.weight": like.new_zeros(condition_size, 256),
        "sigma_map.mlp.0.bias": like.new_zeros(condition_size),
        "sigma_map.mlp.2.weight": like.new_zeros(condition_size, condition_size),
        "sigma_map.mlp.2.bias": like.new_zeros(condition_size),
        "rotary_emb.inv_freq": _inverse_frequencies(hidden // num_heads, like),
        "output_layer.norm_final.weight": state["final_layernorm.weight"],
        "output_layer.linear.weight": state["output_layer.weight"][:vocab_size],
        "output_layer.linear.bias": state["output_layer.bias"][:vocab_size],
        "output_layer.adaLN_modulation.weight": like.new_zeros(2 * hidden, condition_size),
        "output_layer.adaLN_modulation.bias": torch.cat((state["final_layernorm.bias"], zeros)),
    }
    layer = 0
    while f"decoder.layers.{layer}.input_layernorm.weight" in state:
        ours, theirs = f"decoder.layers.{layer}.", f"blocks.{layer}."
        qkv = split_qkv(
            state[ours + "self_attention.linear_qkv.weight"],
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=hidden // num_heads,
        )
        norm1, norm2 = state[ours + "input_layernorm.bias"], state[ours + "pre_mlp_layernorm.bias"]
        out |= {
            theirs + "norm1.weight": state[ours + "input_layernorm.weight"],
            theirs + "attn_qkv.weight": torch.cat(qkv),
            theirs + "attn_out.weight": state[ours + "self_attention.linear_proj.weight"],
            theirs + "norm2.weight": state[ours + "pre_mlp_layernorm.weight"],
            theirs + "mlp.0.weight": state[ours + "mlp.linear_fc1.weight"],
            theirs + "mlp.0.bias": state[ours + "mlp.linear_fc1.bias"],
            theirs + "mlp.2.weight": state[ours + "mlp.linear_fc2.weight"],
            theirs + "mlp.2.bias": state[ours + "mlp.linear_fc2.bias"],
            theirs + "adaLN_modulation.weight": like.new_zeros(6 * hidden, condition_size),
            theirs + "adaLN_modulation.bias": torch.cat((norm1, zeros, ones, norm2, zeros, ones)),
        }
        layer += 1
    return {PREFIX + name: value for name, value in out.items()}


class _Source:
    """The published weights, each of which must be asked for exactly once."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        # Folding multiplies and adds weights: in float64 the only rounding is the last one, back to the type
        # given.
        self.dtype = next(iter(state.values())).dtype
        self._left = {name.removeprefix(PREFIX): value.double() for name, value in state.items()}
        # A table that follows from the head size, kept by the published code as a buffer.
        self._left.pop("rotary_emb.inv_freq", None)

    def has(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str) -> Tensor:
        if name not in self._left:
            raise CheckpointError(
                f"{PREFIX}{name} is missing; these are not the weights of a published BD3-LM or MDLM"
            )
        return self._left.pop(name)

    def finish(self) -> None:
        """Refuse what nobody asked for."""
        if self._left:
            raise CheckpointError(
                f"unknown weights {sorted(self._left)[:8]}; only the published BD3-LM shape can be folded"
            )


def _fold_layer(source: _Source, layer: int, condition: Tensor | None, num_heads: int) -> dict[str, Tensor]:
    theirs, ours = f"blocks.{layer}.", f"decoder.layers.{layer}."
    shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(source, theirs, condition, 6)
    norm1 = _fold_norm(source.take(theirs + "norm1.weight"), shift1, scale1)
    norm2 = _fold_norm(source.take(theirs + "norm2.weight"), shift2, scale2)
    query, key, value = source.take(theirs + "attn_qkv.weight").chunk(3)
    return {
        ours + "input_layernorm.weight": norm1[0],
        ours + "input_layernorm.bias": norm1[1],
        ours + "self_attention.linear_qkv.weight": fuse_qkv(query, key, value, num_kv_heads=num_heads),
        ours + "self_attention.linear_proj.weight": _fold_gate(
            source.take(theirs + "attn_out.weight"), gate1
        ),
        ours + "pre_mlp_layernorm.weight": norm2[0],
        ours + "pre_mlp_layernorm.bias": norm2[1],
        ours + "mlp.linear_fc1.weight": source.take(theirs + "mlp.0.weight"),
        ours + "mlp.linear_fc1.bias": source.take(theirs + "mlp.0.bias"),
        ours + "mlp.linear_fc2.weight": _fold_gate(source.take(theirs + "mlp.2.weight"), gate2),
        ours + "mlp.linear_fc2.bias": _fold_gate(source.take(theirs + "mlp.2.bias"), gate2),
    }


def _condition(source: _Source, sigma: float | Tensor) -> Tensor:
    """C = silu(MLP(sinusoid(sigma))), cosines before sines."""
    first = source.take("sigma_map.mlp.0.weight")
    width = first.shape[1]
    exponent = torch.arange(width // 2, dtype=first.dtype, device=first.device) / (width // 2)
    angle = torch.as_tensor(sigma, dtype=first.dtype, device=first.device) * torch.exp(
        -math.log(10000.0) * exponent
    )
    sinusoid = torch.cat((angle.cos(), angle.sin()))
    inner = F.silu(F.linear(sinusoid, first, source.take("sigma_map.mlp.0.bias")))
    outer = F.linear(inner, source.take("sigma_map.mlp.2.weight"), source.take("sigma_map.mlp.2.bias"))
    return F.silu(outer)


def _modulation(
    source: _Source, prefix: str, condition: Tensor | None, parts: int
) -> tuple[Tensor | None, ...]:
    """The constant modulation of a block, or Nones where the network has none."""
    if condition is None or not source.has(prefix + "adaLN_modulation.weight"):
        return (None,) * parts
    weight = source.take(prefix + "adaLN_modulation.weight")
    return F.linear(condition, weight, source.take(prefix + "adaLN_modulation.bias")).chunk(parts)


def _fold_norm(weight: Tensor, shift: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    if shift is None or scale is None:
        return weight, torch.zeros_like(weight)
    return weight * (1 + scale), shift


def _fold_gate(value: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return value
    return value * (gate.unsqueeze(1) if value.dim() == 2 else gate)


def _inverse_frequencies(head_dim: int, like: Tensor) -> Tensor:
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=like.device) / head_dim
    return 1.0 / 10000.0**exponent
