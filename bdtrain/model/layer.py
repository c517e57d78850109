"""The layer: Megatron's specs filled with our attention, and a forward that drops rows nobody reads."""

from __future__ import annotations

from typing import Any

from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from bdtrain.model.attention import (
    AttentionContext,
    CoreAttention,
    QueryKeyValueLinear,
    TwoStreamSelfAttention,
    UnbiasedRowParallelLinear,
)
from bdtrain.model.config import BDTransformerConfig
from bdtrain.model.norm import HeadNorm, norm_class
from bdtrain_kernels.swiglu import swiglu


class MlpInputLinear(ColumnParallelLinear):  # type: ignore[misc]
    """Megatron's projection that adds its bias itself, where it would hand it to the MLP to add.

    A parameter is thus read by its own module only: ZeRO stage 3 gathers it around that module's forward, and
    one that is handed out stays gathered, with the values of then.
    """

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """Project [rows, batch, hidden], bias included."""
        return _add_bias(*super().forward(input_)), None


class MlpOutputLinear(RowParallelLinear):  # type: ignore[misc]
    """The same for the projection back."""

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """Project [rows, batch, local ffn], bias included."""
        return _add_bias(*super().forward(input_)), None


def _add_bias(output: Tensor, bias: Tensor | None) -> Tensor:
    return output if bias is None else output + bias


class GatedActivation(nn.Module):
    """The activation of a gated feed-forward part, as Megatron's MLP takes one that sees both halves.

    Its own form keeps silu(gate) and a copy of the other half besides; its fused one is compiled at the first
    step, for every shape.
    """

    def __init__(self, config: BDTransformerConfig) -> None:
        """See the class."""
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """[rows, batch, 2 local ffn] -> [rows, batch, local ffn]."""
        return swiglu(x)


class TwoStreamLayer(TransformerLayer):  # type: ignore[misc]
    """Megatron's pre-norm layer; the last one of the model returns the rows of the output streams only."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        *unused_args: Any,
        attention_bias: AttentionContext,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layer.

        Args:
            hidden_states: [seq, batch, hidden].
            attention_mask: not used.
            context: passed through, as Megatron's block expects.
            *unused_args: Megatron's other arguments.
            attention_bias: the context of the forward pass.
            **unused: Megatron's other arguments.

        Returns:
            [rows, batch, hidden], and ``context``.
        """
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        mixed = self.self_attention(self.input_layernorm(hidden_states), attention_bias=attention_bias)
        # Rows that attention left out (the clean stream in the last layer) have no residual either.
        hidden = add(mixed, hidden_states[: mixed[0].shape[0]], self.hidden_dropout)
        normed = self.pre_mlp_layernorm(hidden)
        if self.recompute_mlp and self.training:
            transformed = tensor_parallel.checkpoint(self.mlp, False, normed)
        else:
            transformed = self.mlp(normed)
        add = self.mlp_bda(self.training, self.config.bias_dropout_fusion)
        return add(transformed, hidden, self.hidden_dropout), context


def layer_spec(config: BDTransformerConfig) -> ModuleSpec:
    """What a layer of the configured shape is made of."""
    norm = norm_class(config)
    head_norm = HeadNorm if config.qk_layernorm else None
    return ModuleSpec(
        module=TwoStreamLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=TwoStreamSelfAttention,
                params={"attn_mask_type": AttnMaskType.arbitrary},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=QueryKeyValueLinear,
                    core_attention=CoreAttention,
                    linear_proj=UnbiasedRowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=MlpInputLinear,
                    linear_fc2=MlpOutputLinear,
                    activation_func=GatedActivation if config.gated_linear_unit else None,
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
