"""A trained model as a folder: weights, resolved configuration, tokenizer, and what was known of the run.

model.safetensors   float32, one tensor a parameter, whatever layout trained it
config.yaml         the resolved configuration
tokenizer.model     absent for synthetic data
facts.json          step, tokens, special ids, plan, fingerprints
MANIFEST.json       sizes and digests, written last

A training checkpoint (``save.py``) opens in the same way: its averaged weights where it has any, else its
weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bdtrain.checkpoint.files import DISK, FileActions, copy_file, write_file
from bdtrain.checkpoint.folders import CONFIG, TOKENIZER
from bdtrain.checkpoint.load import EMA, TrainingState
from bdtrain.checkpoint.manifest import MANIFEST, TRAINING_FORMAT, commit_folder, verify_folder
from bdtrain.checkpoint.tensors import TensorSource, write_tensors
from bdtrain.config import RunConfig, load_config
from bdtrain.errors import CheckpointError
from bdtrain.parallel.fragments import MASTER

WEIGHTS = "model.safetensors"
FACTS = "facts.json"


@dataclass(frozen=True)
class SavedModel:
    """A model folder or training checkpoint that was read and verified.

    Attributes:
        folder: where it is.
        config: the configuration of the run that made it; ``model.vocab_size`` is set.
        facts: step, tokens, special ids, fingerprints.
        tokenizer: path of the tokenizer, None for synthetic data.
        training: the training checkpoint, None for a model folder.
    """

    folder: Path
    config: RunConfig
    facts: dict[str, Any]
    tokenizer: Path | None
    training: TrainingState | None = None

    def state(self) -> dict[str, torch.Tensor]:
        """The weights by their canonical names.

        Raises:
            CheckpointError: if a file is not a safetensors file.
        """
        if self.training is not None:
            kind = weights_kind(self.training)
            return {name: self.training.full_tensor(name, kind) for name in self.training.parameters}
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
    actions: FileActions = DISK,
) -> None:
    """Write a model folder, all or nothing.

    Args:
        folder: where it is to appear.
        state: weights by their canonical names.
        config_yaml: the resolved configuration.
        facts: what is to be known of the run; must be JSON.
        tokenizer: the tokenizer's file, None for synthetic data.
        actions: the disk.

    Raises:
        CheckpointError: if the disk refuses.
    """
    sources = [TensorSource(name, tuple(tensor.shape), tensor.detach) for name, tensor in state.items()]
    write_model(folder, sources, config_yaml=config_yaml, facts=facts, tokenizer=tokenizer, actions=actions)


def open_model(folder: Path) -> SavedModel:
    """Verify and open a model folder or a training checkpoint.

    Raises:
        CheckpointError: if it is missing, incomplete or damaged.
        ConfigError: if its configuration is not one this version knows.
    """
    if not (folder / MANIFEST).is_file():
        found = sorted(folder.glob(f"*/{MANIFEST}")) + sorted(folder.glob(f"*/*/{MANIFEST}"))
        if found:
            names = " or ".join(str(path.parent) for path in found[:4])
            raise CheckpointError(f"{folder} is no checkpoint, but holds some; give {names}")
    manifest = verify_folder(folder)
    training = TrainingState.open(folder) if manifest.format == TRAINING_FORMAT else None
    config = load_config([folder / CONFIG], []).config
    if training is None:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    else:
        facts = model_facts(training)
    return SavedModel(
        folder=folder,
        config=config,
        facts=facts,
        tokenizer=folder / TOKENIZER if TOKENIZER in manifest.files else None,
        training=training,
    )


def weights_kind(training: TrainingState) -> str:
    """The kind that a trained model is made of: the average once a step was applied, where one is kept."""
    return EMA if EMA in training.kinds and training.state.get("applied_steps", 0) > 0 else MASTER


def model_facts(training: TrainingState) -> dict[str, Any]:
    """What a model folder made from a training checkpoint knows of the run."""
    return {"step": training.step, **training.state, "averaged": weights_kind(training) == EMA}


def write_model(
    folder: Path,
    sources: Sequence[TensorSource],
    *,
    config_yaml: str,
    facts: Mapping[str, Any],
    tokenizer: Path | None,
    actions: FileActions = DISK,
) -> None:
    """``save_model`` for weights that are read when their turn comes.

    Raises:
        CheckpointError: if the disk refuses.
    """
    with commit_folder(folder, actions=actions) as temporary:
        write_tensors(temporary / WEIGHTS, sources, actions=actions)
        write_file(temporary / CONFIG, [config_yaml.encode()], actions=actions)
        text = json.dumps(dict(facts), indent=1) + "\n"
        write_file(temporary / FACTS, [text.encode()], actions=actions)
        if tokenizer is not None:
            copy_file(tokenizer, temporary / TOKENIZER, actions=actions)
