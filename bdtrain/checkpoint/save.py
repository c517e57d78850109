"""Saving the state of training: every rank writes what it owns, and the whole appears at once or not at all.

rank-00000.safetensors   the fragments of a rank, one tensor a kind and parameter
rank-00000.json          what they are: name, full shape, cut, start, count
state.json               everything that is not a tensor
config.yaml              the resolved configuration
tokenizer.model          absent for synthetic data
MANIFEST.json            format, run, step, sizes and digests; written last

1. Rank 0 looks for room and makes ``.tmp-step-N``.
2. Each rank writes and syncs its two files, digesting what it writes; the digests are gathered.
3. Rank 0 checks that every element of every parameter is there once, writes the rest, the manifest last,
   renames the folder to ``step-N`` and syncs the folder above.

After each phase all ranks know whether any of them failed: then the temporary folder goes, and all raise the
same error.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bdtrain.checkpoint.communicator import Communicator
from bdtrain.checkpoint.files import DISK, FileActions, FileFacts, copy_file, write_file
from bdtrain.checkpoint.folders import CONFIG, STATE, TOKENIZER, check_together, step_name
from bdtrain.checkpoint.index import (
    fragment_bytes,
    index_text,
    read_indices,
    tensor_sources,
    written_fragments,
)
from bdtrain.checkpoint.manifest import TRAINING_FORMAT, Manifest, read_manifest, write_manifest
from bdtrain.checkpoint.tensors import write_tensors
from bdtrain.errors import CheckpointError
from bdtrain.parallel.fragments import StateFragment

ROOM = 1.1
"""Free space asked for, in sizes of the tensors; the rest of a checkpoint is small."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is on disk.

    Attributes:
        folder: where.
        bytes: size of all its files.
        seconds: wall time of the save.
        written: False if a whole one of this step was there already.
    """

    folder: Path
    bytes: int
    seconds: float
    written: bool = True


@dataclass(frozen=True)
class _Save:
    """One save: what does not change while it goes on."""

    root: Path
    step: int
    communicator: Communicator
    actions: FileActions

    @property
    def folder(self) -> Path:
        return self.root / step_name(self.step)

    @property
    def temporary(self) -> Path:
        return self.root / f".tmp-{step_name(self.step)}"

    def on_rank_0(self, action: Callable[[], _T]) -> _T:
        """Do something on rank 0; all ranks return its JSON result, or raise what went wrong."""
        failure, outcome = None, None
        if self.communicator.rank == 0:
            failure, outcome = _attempt(action)
        outcome = self.communicator.broadcast_object(outcome)
        self._raise_any([outcome], failure)
        result: _T = outcome["value"]
        return result

    def on_every_rank(self, action: Callable[[], _T]) -> list[_T]:
        """Do something on every rank; all return all JSON results by rank, or raise what went wrong."""
        failure, outcome = _attempt(action)
        outcomes = self.communicator.gather_objects(outcome)
        self._raise_any(outcomes, failure)
        return [outcome["value"] for outcome in outcomes]

    def _raise_any(self, outcomes: Sequence[Mapping[str, Any]], failure: Exception | None) -> None:
        errors = [
            f"rank {rank}: {outcome['error']}" for rank, outcome in enumerate(outcomes) if "error" in outcome
        ]
        if errors:
            more = f" (and {len(errors) - 4} more ranks)" if len(errors) > 4 else ""
            raise CheckpointError(
                f"step {self.step} was not saved in {self.root}: {'; '.join(errors[:4])}{more}; "
                "older checkpoints are untouched"
            ) from failure


def save_training_state(
    root: Path,
    *,
    step: int,
    fragments: Sequence[StateFragment],
    state: Mapping[str, Any],
    config_yaml: str,
    tokenizer: Path | None,
    run_uid: str,
    communicator: Communicator,
    actions: FileActions = DISK,
) -> SavedCheckpoint:
    """Write the training state of this step, by all ranks together.

    Step folders are never replaced: if a whole one of this run is there, nothing is done; a damaged one is
    moved to ``.damaged-step-N`` first.

    Args:
        root: folder of the run's checkpoints, on a file system that all ranks share.
        step: batches taken.
        fragments: what this rank owns; together the ranks own every element once.
        state: everything that is not a tensor, JSON values; rank 0's is written.
        config_yaml: the resolved configuration; rank 0's is written.
        tokenizer: the tokenizer's file, None for synthetic data.
        run_uid: of the run.
        communicator: the ranks; all must call this.
        actions: the disk.

    Raises:
        CheckpointError: if anything failed on any rank: the same on all, naming the rank and the reason.
    """
    started = time.monotonic()
    save = _Save(root, step, communicator, actions)
    if save.on_rank_0(save.folder.exists):
        if check_together(save.folder, communicator, run_uid) is None:
            size = save.on_rank_0(lambda: _folder_bytes(save.folder))
            return SavedCheckpoint(save.folder, size, time.monotonic() - started, written=False)
        save.on_rank_0(lambda: _move_aside(save))
    mine = written_fragments(fragments)
    total = sum(save.on_every_rank(lambda: fragment_bytes(mine)))
    try:
        texts = save.on_rank_0(lambda: _prepare(save, state, config_yaml, total))
        listed = save.on_every_rank(lambda: _write_rank(save, mine))
        facts = {"run_uid": run_uid, "step": step, "world_size": communicator.world_size}
        size = save.on_rank_0(lambda: _commit(save, listed, texts, tokenizer, facts))
    except CheckpointError:
        if communicator.rank == 0:
            with contextlib.suppress(OSError):
                actions.remove(save.temporary)
        communicator.barrier()
        raise
    return SavedCheckpoint(save.folder, size, time.monotonic() - started)


def _attempt(action: Callable[[], _T]) -> tuple[Exception | None, dict[str, Any]]:
    """The outcome of an action as a JSON value: the other ranks wait for it, whatever it is."""
    try:
        return None, {"value": action()}
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return error, {"error": f"{where}{error.strerror or error}"}
    except CheckpointError as error:
        return error, {"error": str(error)}
    except Exception as error:
        return error, {"error": f"{type(error).__name__}: {error}"}


def _prepare(save: _Save, state: Mapping[str, Any], config_yaml: str, total: int) -> dict[str, str]:
    """Texts of the files that rank 0 writes, after making an empty temporary folder."""
    check_json(state, "state")
    texts = {STATE: json.dumps(dict(state), indent=1) + "\n", CONFIG: config_yaml}
    save.root.mkdir(parents=True, exist_ok=True)
    save.actions.remove(save.temporary)
    free, needed = save.actions.free_bytes(save.root), math.ceil(ROOM * total)
    if free < needed:
        raise CheckpointError(
            f"it needs {needed / 1e9:.3g} GB and {save.root} has {free / 1e9:.3g} GB free; make room, lower "
            "checkpoint.keep_last, or put run.folder on a larger disk"
        )
    save.actions.make_folder(save.temporary)
    return texts


def _write_rank(save: _Save, fragments: Sequence[StateFragment]) -> dict[str, tuple[int, str]]:
    """Write this rank's two files; their names with size and digest."""
    if not fragments:
        return {}
    stem = f"rank-{save.communicator.rank:05d}"
    tensors, index = f"{stem}.safetensors", f"{stem}.json"
    written = {
        tensors: write_tensors(save.temporary / tensors, tensor_sources(fragments), actions=save.actions),
        index: write_file(
            save.temporary / index, [index_text(fragments, tensors).encode()], actions=save.actions
        ),
    }
    return {name: (facts.size, facts.sha256) for name, facts in written.items()}


def _commit(
    save: _Save,
    listed: Sequence[Mapping[str, Sequence[Any]]],
    texts: Mapping[str, str],
    tokenizer: Path | None,
    facts: Mapping[str, Any],
) -> int:
    """Complete the folder and give it its name; the size of its files."""
    folder, actions = save.temporary, save.actions
    files = {name: FileFacts(*entry) for rank in listed for name, entry in rank.items()}
    indices = sorted(name for name in files if name.endswith(".json"))
    if not indices:
        raise CheckpointError("no rank owns anything")
    # Found out now rather than when the run is to go on.
    read_indices([folder / name for name in indices])
    for name, text in texts.items():
        files[name] = write_file(folder / name, [text.encode()], actions=actions)
    if tokenizer is not None:
        files[TOKENIZER] = copy_file(tokenizer, folder / TOKENIZER, actions=actions)
    write_manifest(folder, Manifest(files, TRAINING_FORMAT, facts), actions=actions)
    actions.rename(folder, save.folder)
    actions.fsync(save.root)
    return _folder_bytes(save.folder)


def _folder_bytes(folder: Path) -> int:
    return read_manifest(folder).size


def _move_aside(save: _Save) -> None:
    """Give a damaged folder another name; it is the user's to look at."""
    target = save.root / f".damaged-{save.folder.name}"
    number = 2
    while target.exists():
        target = save.root / f".damaged-{save.folder.name}-{number}"
        number += 1
    save.actions.rename(save.folder, target)


def check_json(value: Any, where: str) -> None:
    """Refuse what JSON would not give back: tensors, sets, keys that are not texts.

    Raises:
        CheckpointError: naming where it is.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r}, and only texts survive in JSON")
            check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            check_json(item, f"{where}[{number}]")
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise CheckpointError(f"{where} is a {type(value).__name__}, which JSON cannot hold")
