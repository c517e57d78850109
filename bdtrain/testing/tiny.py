"""Models small enough for a unit test, with every feature in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bdtrain.config import ModelConfig


def tiny_model_config(shape: str = "qwen3", **changes: Any) -> ModelConfig:
    """A ``model`` section of 2 layers and 32 channels.

    Args:
        shape: "qwen3" (4 query heads over 2 key heads) or "bd3lm" (4 heads).
        **changes: keys of the section to set otherwise.
    """
    from bdtrain.config import ModelConfig

    sizes: dict[str, Any] = {
        "shape": shape,
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2 if shape == "qwen3" else None,
        "head_dim": 8,
        "ffn_size": 64,
        "vocab_size": 29,
        "vocab_multiple": 16,
        # Larger than in training: logits must differ for a test of them to mean something.
        "init_std": 0.2,
    }
    return ModelConfig(**{**sizes, **changes})
