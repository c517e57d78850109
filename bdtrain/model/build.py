"""From the configuration to an initialised model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from bdtrain.errors import ConfigError
from bdtrain.model.config import build_transformer_config
from bdtrain.model.gradients import accumulate_in_float32, check_marks, mark_partial_gradients
from bdtrain.model.init import initialise_parameters
from bdtrain.model.transformer import TwoStreamTransformer
from bdtrain_kernels import BackendUnavailableError, check_attention_backend

if TYPE_CHECKING:
    from bdtrain.config import ModelConfig


DTYPES: Mapping[str, torch.dtype] = MappingProxyType({"fp32": torch.float32, "bf16": torch.bfloat16})
"""Type of the parameters by ``train.precision``."""


def build_model(
    model: ModelConfig,
    *,
    pg_collection: Any,
    mask_id: int,
    vocab_size: int | None = None,
    seed: int = 1234,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention_backend: str | None = None,
    sequence_parallel: bool = False,
    recompute: str = "none",
    **overrides: Any,
) -> TwoStreamTransformer:
    """Build this rank's part of the model, with its initial weights.

    Args:
        model: the ``model`` section of the run configuration.
        pg_collection: process groups; the part follows from its ``tp`` and ``pp``.
        mask_id: id of [MASK].
        vocab_size: tokens of the vocabulary, in place of ``model.vocab_size``.
        seed: of the run; the same on every rank.
        dtype: type of the parameters.
        device: where they live.
        attention_backend: in place of ``model.attention_backend``.
        sequence_parallel: the ranks of ``tp`` split the rows between the layers' projections, too.
        recompute: activations made again in backward: "none", "core_attn" (of attention itself) or "full"
            (each layer from its input).
        **overrides: further fields of Megatron's TransformerConfig.

    Raises:
        ConfigError: if sizes do not fit, no vocabulary size is known, or the attention backend cannot run on
            the device.
    """
    size = vocab_size or model.vocab_size
    if size is None:
        raise ConfigError(
            "the size of the vocabulary is unknown; take it from the tokenizer, or set model.vocab_size"
        )
    tp, pp = pg_collection.tp, pg_collection.pp
    config = build_transformer_config(
        model,
        vocab_size=size,
        mask_id=mask_id,
        dtype=dtype,
        tensor_parallel=tp.size(),
        pipeline_parallel=pp.size(),
        attention_backend=attention_backend,
        sequence_parallel=sequence_parallel,
        recompute=recompute,
        **overrides,
    )
    try:
        check_attention_backend(
            config.block_attention_backend, torch.device(device), head_dim=config.kv_channels, dtype=dtype
        )
    except BackendUnavailableError as error:
        raise ConfigError(f"model.attention_backend: {error}") from None
    built = TwoStreamTransformer(
        config,
        pg_collection=pg_collection,
        pre_process=pp.rank() == 0,
        post_process=pp.rank() == pp.size() - 1,
    )
    mark_partial_gradients(built)
    check_marks(built)
    initialise_parameters(built, seed=seed)
    built.to(device)
    accumulate_in_float32(built)
    return built
