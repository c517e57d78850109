"""A model folder made from a training checkpoint, whatever layout wrote it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from bdtrain.checkpoint.files import DISK, FileActions
from bdtrain.checkpoint.folders import CONFIG
from bdtrain.checkpoint.load import TrainingState
from bdtrain.checkpoint.manifest import verify_folder
from bdtrain.checkpoint.tensors import TensorSource
from bdtrain.checkpoint.weights import model_facts, weights_kind, write_model


def export_weights(
    training_folder: Path, folder: Path, *, verified: bool = False, actions: FileActions = DISK
) -> None:
    """Write a model folder from a training checkpoint, with one parameter in memory at a time.

    Args:
        training_folder: the checkpoint.
        verified: it was written or checked this moment; else every byte of it is read first.
        folder: where the model folder is to appear; an older one of that name is replaced.
        actions: the disk.

    Raises:
        CheckpointError: if the checkpoint is damaged or none, or the disk refuses.
    """
    if not verified:
        verify_folder(training_folder)
    training = TrainingState.open(training_folder)
    kind = weights_kind(training)
    sources = [
        TensorSource(name, parameter.full_shape, partial(training.full_tensor, name, kind))
        for name, parameter in training.parameters.items()
    ]
    write_model(
        folder,
        sources,
        config_yaml=(training_folder / CONFIG).read_text(encoding="utf-8"),
        facts=model_facts(training),
        tokenizer=training.tokenizer,
        actions=actions,
    )
