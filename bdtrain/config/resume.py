"""Which settings make a run what it is, and which may change when it goes on.

A continued run must draw the same noise, read the same rows in the same order and train the same network:
what decides those is fixed. The rest is free, and a change is recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bdtrain.config.estimate import known_vocab_size
from bdtrain.config.loader import plain_value
from bdtrain.config.problems import known_keys
from bdtrain.config.schema import RunConfig

Change = tuple[str, Any, Any]
"""Key, value before, value now."""

VOCABULARY = "model.vocab_size"

_FIXED = ("model.", "diffusion.", "data.", "run.seed", "train.global_batch_size", "train.init_from")
# The corpus is known by its fingerprint, wherever it lies; a backend is a way to compute the same numbers.
_FREE_INSIDE = ("data.path", "data.prefetch_batches", "model.attention_backend")
_UNRECORDED = ("run.name", "run.folder", "run.resume", "train.log_every_steps", "tracking.")


def fixed_settings(config: RunConfig) -> dict[str, Any]:
    """Settings whose change makes it another run, by dotted key, as JSON has them.

    ``model.vocab_size`` is what the data say where it was left out, and None where only a corpus says it.
    """
    settings = {key: plain_value(config, key) for key in known_keys() if _is_fixed(key)}
    settings[VOCABULARY] = known_vocab_size(config)
    return settings


def fixed_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Fixed settings that differ; with any of them it is another run.

    Args:
        saved: ``fixed_settings`` of the run, as it was or back from JSON. A setting that it does not have is
            of a newer version and is not compared.
        now: ``fixed_settings`` of the configuration that wants to go on.
    """
    changes = [(key, saved[key], value) for key, value in now.items() if key in saved and saved[key] != value]
    # Left to the corpus before or now: its fingerprint says whether it is another one.
    return [c for c in changes if c[0] != VOCABULARY or None not in c[1:]]


def changed_settings(saved: RunConfig, now: RunConfig) -> list[Change]:
    """Free settings that differ, in the order of the schema.

    The name and the folder of the run, and what concerns its reports alone, are left out.
    """
    free = [key for key in known_keys() if not _is_fixed(key) and not key.startswith(_UNRECORDED)]
    pairs = ((key, plain_value(saved, key), plain_value(now, key)) for key in free)
    return [(key, before, after) for key, before, after in pairs if before != after]


def _is_fixed(key: str) -> bool:
    return key.startswith(_FIXED) and key not in _FREE_INSIDE
