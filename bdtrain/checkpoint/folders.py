"""The folders of a run's training checkpoints: finding the newest whole one, and deleting old ones."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bdtrain.checkpoint.communicator import Communicator, OneProcess
from bdtrain.checkpoint.files import DISK, FileActions
from bdtrain.checkpoint.manifest import TRAINING_FORMAT, Manifest, read_manifest, verify_folder
from bdtrain.errors import CheckpointError

STATE = "state.json"
CONFIG = "config.yaml"
TOKENIZER = "tokenizer.model"
_STEP = re.compile(r"step-\d{9,}")
_LEFTOVERS = (".tmp-step-*", ".tmp-dead-*")


class FoundCheckpoints(NamedTuple):
    """What a search found.

    Attributes:
        newest: the newest whole checkpoint, None if there is none.
        rejected: newer ones that were passed over, newest first, each with the reason.
    """

    newest: Path | None
    rejected: list[tuple[Path, str]]


def step_name(step: int) -> str:
    """Name of a step's folder; names sort as steps do."""
    return f"step-{step:09d}"


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Steps and folders of all checkpoints in ``root``, damaged ones too, oldest first."""
    if not root.is_dir():
        return []
    names = [path for path in root.iterdir() if _STEP.fullmatch(path.name)]
    return sorted((int(path.name.removeprefix("step-")), path) for path in names)


def find_checkpoints(root: Path, *, run_uid: str | None = None) -> FoundCheckpoints:
    """The newest whole checkpoint, found by looking at every byte of it.

    Args:
        root: folder of the run's checkpoints; need not exist.
        run_uid: of the run; a checkpoint of another one is passed over. None takes any.
    """
    return choose_checkpoint(root, OneProcess(), run_uid)


def choose_checkpoint(root: Path, communicator: Communicator, run_uid: str | None) -> FoundCheckpoints:
    """``find_checkpoints`` by all ranks together, which share the reading and agree on the result.

    Args:
        root: folder of the run's checkpoints, the same on every rank.
        communicator: the ranks; all must call this.
        run_uid: of the run, None for any.
    """
    names: list[str] = communicator.broadcast_object(
        [path.name for _, path in reversed(list_checkpoints(root))] if communicator.rank == 0 else []
    )
    rejected: list[tuple[Path, str]] = []
    for name in names:
        reason = check_together(root / name, communicator, run_uid)
        if reason is None:
            return FoundCheckpoints(root / name, rejected)
        rejected.append((root / name, reason))
    return FoundCheckpoints(None, rejected)


def check_together(folder: Path, communicator: Communicator, run_uid: str | None) -> str | None:
    """Why a step's folder cannot be used, the same text on every rank; None if it can.

    Every rank hashes its share of the files.
    """
    try:
        manifest = verify_folder(folder, part=(communicator.rank, communicator.world_size))
        reason = _foreign(manifest, folder, run_uid)
    except CheckpointError as error:
        reason = str(error)
    except OSError as error:
        reason = f"{error.filename or folder}: {error.strerror or error}"
    reasons = [reason for reason in communicator.gather_objects(reason) if reason is not None]
    return "; ".join(dict.fromkeys(reasons)) or None


def clean_leftovers(root: Path, *, actions: FileActions = DISK) -> list[str]:
    """Delete what interrupted saves and deletions left.

    Only the owner of the run's lock may call this: a folder that is being written looks the same.

    Returns:
        Names of what was deleted.

    Raises:
        CheckpointError: if the disk refuses.
    """
    found = sorted(path for pattern in _LEFTOVERS for path in root.glob(pattern))
    for path in found:
        try:
            actions.remove(path)
        except OSError as error:
            raise CheckpointError(
                f"could not delete {path}, left by an interrupted save: {error.strerror or error}"
            ) from error
    return [path.name for path in found]


def prune(
    root: Path,
    *,
    keep_last: int,
    keep_every_tokens: int | None,
    trusted: Path | None = None,
    actions: FileActions = DISK,
) -> list[Path]:
    """Delete checkpoints that are no longer wanted; called by one rank.

    Kept are the last ones, and for good the first one after each multiple of ``keep_every_tokens``. Folders
    that are visibly damaged are neither counted nor deleted. Nothing is deleted unless one of the kept ones
    is known to be whole.

    Args:
        root: folder of the run's checkpoints.
        keep_last: how many of the newest to keep, at least 1.
        keep_every_tokens: tokens of training between those that stay for good; None for none.
        trusted: one known to be whole, such as the one just saved; else kept ones are read until one is.
        actions: the disk.

    Returns:
        The folders that were deleted.

    Raises:
        CheckpointError: if the disk refuses.
    """
    assert keep_last >= 1, "the configuration keeps at least one"
    complete = [
        found for step, folder in list_checkpoints(root) if (found := _describe(step, folder)) is not None
    ]
    kept = _permanent(complete, keep_every_tokens) | {last.folder for last in complete[-keep_last:]}
    doomed = [old.folder for old in complete if old.folder not in kept]
    if not doomed or not _any_whole(kept, trusted):
        return []
    for folder in doomed:
        dead = root / f".tmp-dead-{folder.name}"
        try:
            # Renamed first: half a deletion must not look like a checkpoint.
            actions.remove(dead)
            actions.rename(folder, dead)
            actions.remove(dead)
        except OSError as error:
            raise CheckpointError(
                f"could not delete the old checkpoint {folder}: {error.strerror or error}"
            ) from error
    return doomed


@dataclass(frozen=True)
class _Complete:
    step: int
    folder: Path
    tokens: int


def _foreign(manifest: Manifest, folder: Path, run_uid: str | None) -> str | None:
    """Why a whole folder is not a checkpoint of this run at this step."""
    if manifest.format != TRAINING_FORMAT:
        return f"{folder} holds {manifest.format!r}, not a training checkpoint ({TRAINING_FORMAT!r})"
    found = manifest.facts.get("run_uid")
    if run_uid is not None and found != run_uid:
        return f"{folder} belongs to another run (uid {found}, this run is {run_uid})"
    step = manifest.facts.get("step")
    if not isinstance(step, int) or step_name(step) != folder.name:
        return f"{folder} holds step {step}, which is not its name's"
    return None


def _describe(step: int, folder: Path) -> _Complete | None:
    """A checkpoint that looks whole: all files there, in the sizes of the manifest."""
    with contextlib.suppress(CheckpointError, OSError, ValueError, KeyError, TypeError):
        manifest = read_manifest(folder)
        if manifest.format == TRAINING_FORMAT and all(
            (folder / name).stat().st_size == facts.size for name, facts in manifest.files.items()
        ):
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            return _Complete(step, folder, int(state.get("tokens", 0)))
    return None


def _permanent(complete: Sequence[_Complete], every: int | None) -> set[Path]:
    """The first one after each multiple of ``every`` tokens; deleting the others changes no later answer."""
    if every is None:
        return set()
    kept, passed = set(), 0
    for found in complete:
        multiples = found.tokens // every
        if multiples > passed:
            kept.add(found.folder)
            passed = multiples
    return kept


def _any_whole(folders: set[Path], trusted: Path | None) -> bool:
    if trusted in folders:
        return True
    for folder in sorted(folders, reverse=True):
        with contextlib.suppress(CheckpointError, OSError):
            verify_folder(folder)
            return True
    return False
