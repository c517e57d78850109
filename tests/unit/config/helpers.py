"""A smallest valid run, and loading that returns the error text."""

from __future__ import annotations

from pathlib import Path

import pytest

from bdtrain.config import LoadedConfig, load_config
from bdtrain.errors import ConfigError

MINIMAL = (
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_heads=4",
    "train.steps=100",
    "train.global_batch_size=8",
    "data.kind=synthetic",
)


def load(*overrides: str, files: tuple[Path, ...] = ()) -> LoadedConfig:
    """The minimal run with overrides; an override replaces the minimal value of its key."""
    given = {text.partition("=")[0] for text in overrides}
    kept = [text for text in MINIMAL if text.partition("=")[0] not in given] if not files else []
    return load_config(list(files), [*kept, *overrides])


def problems(*overrides: str, files: tuple[Path, ...] = ()) -> list[str]:
    """The problem lines of a run that must be refused."""
    with pytest.raises(ConfigError) as caught:
        load(*overrides, files=files)
    head, *lines = str(caught.value).splitlines()
    assert head.startswith(str(len(lines))), "the head counts the problems"
    return [line.strip() for line in lines]


def only_problem(*overrides: str, files: tuple[Path, ...] = ()) -> str:
    """The problem of a run with exactly one."""
    lines = problems(*overrides, files=files)
    assert len(lines) == 1, lines
    return lines[0]
