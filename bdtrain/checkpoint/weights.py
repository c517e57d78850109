"""A trained model as a folder: weights, resolved configuration, tokenizer, and what was known of the run.

model.safetensors   float32, one tensor a parameter, whatever layout trained it
config.yaml         the resolved configuration
tokenizer.model     absent for synthetic data
facts.json          step, tokens, special ids, plan, fingerprints
MANIFEST.json       sizes and digests, written last
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from bdtrain.checkpoint.manifest import commit_folder, verify_folder
from bdtrain.config import RunConfig, load_config
from bdtrain.errors import CheckpointError

WEIGHTS = "model.safetensors"
CONFIG = "config.yaml"
TOKENIZER = "tokenizer.model"
FACTS = "facts.json"


@dataclass(frozen=True)
class SavedModel:
    """A model folder that was read and verified.

    Attributes:
        folder: where it is.
        config: the configuration of the run that made it; ``model.vocab_size`` is set.
        facts: step, tokens, special ids, fingerprints.
        tokenizer: path of the tokenizer, None for synthetic data.
    """

    folder: Path
    config: RunConfig
    facts: dict[str, Any]
    tokenizer: Path | None

    def state(self) -> dict[str, torch.Tensor]:
        """The weights by their canonical names.

        Raises:
            CheckpointError: if the file is not a safetensors file.
        """
        try:
            return load_file(self.folder / WEIGHTS)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / WEIGHTS} cannot be read ({error})") from error


def save_model(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    *,
    config_yaml: str,
    facts: Mapping[str, Any],
    tokenizer: Path | None,
) -> None:
    """Write a model folder, all or nothing.

    Args:
        folder: where it is to appear.
        state: weights by their canonical names.
        config_yaml: the resolved configuration.
        facts: what is to be known of the run; must be JSON.
        tokenizer: the tokenizer's file, None for synthetic data.

    Raises:
        CheckpointError: if the disk refuses.
    """
    with commit_folder(folder) as temporary:
        weights = {
            name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in state.items()
        }
        try:
            save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            # It wraps the system's refusal (disk full) in an error of its own.
            raise OSError(str(error)) from error
        (temporary / CONFIG).write_text(config_yaml, encoding="utf-8")
        (temporary / FACTS).write_text(json.dumps(dict(facts), indent=1) + "\n", encoding="utf-8")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / TOKENIZER)


def open_model(folder: Path) -> SavedModel:
    """Verify and open a model folder.

    Raises:
        CheckpointError: if it is missing, incomplete or damaged.
        ConfigError: if its configuration is not one this version knows.
    """
    verify_folder(folder)
    config = load_config([folder / CONFIG], []).config
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    tokenizer = folder / TOKENIZER
    return SavedModel(
        folder=folder, config=config, facts=facts, tokenizer=tokenizer if tokenizer.exists() else None
    )
