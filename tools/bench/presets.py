"""Presets whose whole training step is measured, with rows of another length or other blocks if wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bdtrain.config import RunConfig, load_config

ROOT = Path(__file__).resolve().parents[2]

_TINY = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_heads": 2,
    "model.vocab_size": 97,
    "data.seq_len": 32,
    "train.micro_batch_size": 4,
}

PRESETS: Mapping[str, tuple[str, Mapping[str, int]]] = {
    "small": ("configs/run/small-1gpu.yaml", {}),
    "1b": ("configs/run/1b-8gpu.yaml", {}),
    "tiny": ("configs/run/small-1gpu.yaml", _TINY),
}
"""Configuration, and what is changed in it."""


def preset_config(name: str, seq: int | None = None, block_size: int | None = None) -> RunConfig:
    """A preset, perhaps with rows of another length and other blocks; a step has the preset's tokens.

    Args:
        name: key of ``PRESETS``.
        seq: tokens of a row; None takes the preset's.
        block_size: tokens of a block, L'; None takes the preset's.

    Raises:
        ConfigError: if they do not fit each other.
    """
    path, own = PRESETS[name]
    wanted = dict(own)
    if block_size is not None:
        wanted["diffusion.block_size"] = block_size
    if seq is not None:
        wanted["data.seq_len"] = seq
    if seq is not None and seq > 0:  # what is no length at all is refused below, with its own message
        preset = preset_config(name)
        rows = max(1, (preset.train.micro_batch_size or 1) * preset.data.seq_len // seq)
        wanted |= {"train.micro_batch_size": rows, "train.global_batch_size": rows}
    return load_config([ROOT / path], [f"{key}={value}" for key, value in wanted.items()]).config
