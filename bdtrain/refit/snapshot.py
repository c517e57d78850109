"""What a re-fit reads: the weights of one step, written by all ranks as a checkpoint without its moments.

RUN/refit/snapshots/step-N   the averaged weights (the weights themselves where no average is kept), the
                             configuration, the state with the noise plan; sizes and digests in its manifest
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bdtrain.checkpoint.communicator import Communicator
from bdtrain.checkpoint.files import hash_file
from bdtrain.checkpoint.folders import list_checkpoints, step_name
from bdtrain.checkpoint.load import EMA
from bdtrain.checkpoint.manifest import MANIFEST
from bdtrain.checkpoint.save import SavedCheckpoint, save_training_state
from bdtrain.config import DataConfig, RunConfig
from bdtrain.files import sync_folder
from bdtrain.parallel.fragments import MASTER, StateFragment

SNAPSHOTS = "snapshots"
KEPT = 2
"""Snapshots that stay: the one at work and the one before."""


def refit_folder(run: Path) -> Path:
    """Folder of a run's re-fits."""
    return run / "refit"


def snapshots_folder(run: Path) -> Path:
    """Folder of its snapshots."""
    return refit_folder(run) / SNAPSHOTS


def snapshot_folder(run: Path, step: int) -> Path:
    """The snapshot of a step."""
    return snapshots_folder(run) / step_name(step)


def result_folder(run: Path, step: int) -> Path:
    """What a re-fit of a step's snapshot leaves: schedule.json, report.json, log.txt."""
    return refit_folder(run) / step_name(step)


def write_snapshot(
    run: Path,
    *,
    step: int,
    fragments: Sequence[StateFragment],
    state: Mapping[str, Any],
    config_yaml: str,
    tokenizer: Path | None,
    run_uid: str,
    communicator: Communicator,
) -> SavedCheckpoint:
    """Write the snapshot of this step, by all ranks together.

    Args:
        run: folder of the run.
        step: batches taken.
        fragments: what this rank owns of the training state; only weights are written.
        state: everything that is not a tensor, as in a checkpoint.
        config_yaml: the resolved configuration.
        tokenizer: the tokenizer's file, None for synthetic data.
        run_uid: of the run.
        communicator: the ranks; all must call this.

    Raises:
        CheckpointError: if the disk refuses, the same on all ranks.
    """
    averaged = bool(state.get("averaged"))
    kind = EMA if averaged else MASTER
    weights = [replace(fragment, tensors={kind: fragment.tensors[kind]}) for fragment in fragments]
    saved = save_training_state(
        snapshots_folder(run),
        step=step,
        fragments=weights,
        state=state,
        config_yaml=config_yaml,
        tokenizer=tokenizer,
        run_uid=run_uid,
        communicator=communicator,
    )
    if communicator.rank == 0:
        # Here no OSError may come out: on this rank alone it would part the ranks.
        with contextlib.suppress(OSError):
            older = [place for number, place in list_checkpoints(snapshots_folder(run)) if number <= step]
            _delete(older[:-KEPT])
    return saved


def forget_later(run: Path, step: int) -> None:
    """Delete snapshots of steps that the run has not taken yet: an earlier attempt left them. For rank 0.

    The run may come to those steps with other weights, and a step's snapshot is never replaced.

    Args:
        run: folder of the run.
        step: batches taken.
    """
    with contextlib.suppress(OSError):
        _delete([place for number, place in list_checkpoints(snapshots_folder(run)) if number > step])


def set_aside(run: Path, attempt: int) -> Path | None:
    """Give all re-fits of the attempts before this one another name: the run begins otherwise. For rank 0.

    What they said stays, for people to look at; their snapshots are deleted, as those of any former future.

    Args:
        run: folder of the run.
        attempt: number of this start.

    Returns:
        Where they are now; None if there were none.

    Raises:
        OSError: if the disk refuses; they are where they were then, and the run would use them.
    """
    source = refit_folder(run)
    target = source.with_name(f"{source.name}-before-attempt-{attempt}")
    number = 2
    while target.exists():
        target = source.with_name(f"{source.name}-before-attempt-{attempt}-{number}")
        number += 1
    try:
        source.rename(target)
    except FileNotFoundError:
        return None
    sync_folder(run)
    with contextlib.suppress(OSError):
        shutil.rmtree(target / SNAPSHOTS)
    return target


def _delete(folders: Sequence[Path]) -> None:
    """Delete snapshots; one that cannot be deleted costs nothing but room."""
    for folder in folders:
        with contextlib.suppress(OSError):
            # Renamed first: half a deletion must not look like a snapshot.
            dead = folder.with_name(f".tmp-dead-{folder.name}")
            folder.rename(dead)
            shutil.rmtree(dead)


def snapshot_digest(folder: Path) -> str:
    """SHA-256 of a snapshot's manifest, which holds the digests of its files."""
    return hash_file(folder / MANIFEST).sha256


def data_section(config: RunConfig, path: str | None) -> DataConfig:
    """The ``data`` section of a run, or the same for another corpus."""
    if path is None:
        return config.data
    return config.data.model_copy(update={"path": path, "kind": "corpus"})
