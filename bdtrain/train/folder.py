"""The run's folder: one writer at a time, and a run in it is continued or left alone, never written over.

run.json             who the run is: uid, attempts, the settings and the data that make it this run
config.yaml          the resolved configuration of the latest attempt
metrics.jsonl        every number (``bdtrain.tracking.jsonl``)
checkpoints/step-N   training state (``bdtrain.checkpoint``)
checkpoint/          final weights
refit/               re-fits of the noise plan; refit-before-attempt-N of a run that began otherwise
samples.jsonl, summary.json
EXIT.json            how the last attempt ended; missing while one runs, and after one that was killed

Nothing here needs torch.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdtrain.config import RunConfig, dump_resolved, load_config
from bdtrain.config.resume import changed_settings, fixed_changes, fixed_settings
from bdtrain.errors import BdtrainError, CheckpointError, ConfigError
from bdtrain.files import TEMPORARY_PREFIX, sync_folder, write_atomic
from bdtrain.tracking.jsonl import last_attempt
from bdtrain.tracking.run_files import (
    CHECKPOINTS,
    CONFIG_FILE,
    EXIT_FILE,
    LOCK_FILE,
    METRICS_FILE,
    REPORT_FILE,
    RUN_FILE,
    SUMMARY_FILE,
)
from bdtrain.train.run_lock import RunLock
from bdtrain.train.signals import LAUNCHER_GONE

if TYPE_CHECKING:
    from bdtrain.checkpoint.communicator import Communicator

REASONS = ("finished", "SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP", LAUNCHER_GONE, "nonfinite", "error")
"""How an attempt ends, unless it is killed."""

_UNFINISHED = (TEMPORARY_PREFIX, ".tmp-")
"""What the names of half-written files begin with; the second is of earlier versions."""


@dataclass(frozen=True)
class RunFolder:
    """A claimed folder.

    Attributes:
        path: where.
        run_uid: of the run, made once.
        attempt: number of this start, from 1.
        known: what run.json said before this attempt; None for a new run.
        note: whose lock was taken over, None if the last owner left in order.
    """

    path: Path
    run_uid: str
    attempt: int
    known: dict[str, Any] | None
    note: str | None = None

    @property
    def checkpoints(self) -> Path:
        """Folder of the training checkpoints."""
        return self.path / CHECKPOINTS


def claim_run_folder(config: RunConfig, communicator: Communicator, lock: RunLock) -> RunFolder:
    """Lock the folder and say what is in it; every rank calls this, rank 0 looks.

    Nothing is written but the lock: ``begin_attempt`` does that, when the run can start.

    Args:
        config: the run.
        communicator: all ranks.
        lock: of the folder; acquired on rank 0.

    Raises:
        ConfigError: the same on all ranks: the folder holds another run, a finished one or other files, or
            is being written.
    """

    def look() -> dict[str, Any]:
        folder = Path(config.run.folder)
        _inspect(config, folder)
        note = lock.acquire()
        known = _inspect(config, folder)
        # After a power failure the metrics file may know of an attempt that run.json forgot.
        before = max(int(known["attempts"]) if known else 0, last_attempt(folder / METRICS_FILE))
        uid = known["run_uid"] if known else uuid.uuid4().hex
        return {"known": known, "uid": uid, "attempt": before + 1, "note": note}

    found = on_first_rank(communicator, look)
    known = found["known"]
    return RunFolder(
        path=Path(config.run.folder),
        run_uid=found["uid"],
        attempt=found["attempt"],
        known=known,
        note=found["note"],
    )


def changed_since_last(folder: RunFolder, config: RunConfig, communicator: Communicator) -> list[list[Any]]:
    """Free settings that the attempt before this one had otherwise; every rank calls this.

    Args:
        folder: from ``claim_run_folder``; ``begin_attempt`` has not been called.
        config: the run.
        communicator: all ranks.

    Returns:
        Key, value before, value now. A configuration that cannot be read counts as another one.
    """

    def compare() -> list[list[Any]]:
        try:
            before = load_config([folder.path / CONFIG_FILE]).config
        except (BdtrainError, OSError, ValueError) as error:
            return [[CONFIG_FILE, f"unreadable ({type(error).__name__})", "this configuration"]]
        return [list(change) for change in changed_settings(before, config)]

    changes: list[list[Any]] = on_first_rank(communicator, compare)
    return changes


def begin_attempt(folder: RunFolder, config: RunConfig, facts: dict[str, Any]) -> None:
    """Write run.json and the resolved configuration; rank 0 only.

    Args:
        folder: from ``claim_run_folder``.
        config: the run.
        facts: what identifies its data.

    Raises:
        ConfigError: if the disk refuses; what the folder held is untouched.
    """
    content = folder.known or {
        "run_uid": folder.run_uid,
        "created": round(time.time(), 3),
        "fixed_settings": fixed_settings(config),
        **facts,
    }
    try:
        write_json(folder.path / RUN_FILE, {**content, "attempts": folder.attempt})
        write_atomic(folder.path / CONFIG_FILE, dump_resolved(config).encode())
        clear_exit(folder.path)
        for name in (RUN_FILE, CONFIG_FILE, EXIT_FILE, SUMMARY_FILE, REPORT_FILE):
            for left in folder.path.glob(f"{TEMPORARY_PREFIX}*.{name}"):
                left.unlink(missing_ok=True)  # of a killed attempt; the lock says that no other one lives
        folder.checkpoints.mkdir(exist_ok=True)
        # The entries that hold everything else must survive a power failure too.
        sync_folder(folder.path)
        sync_folder(folder.path.parent)
    except OSError as error:
        raise ConfigError(
            f"run.folder={folder.path} cannot be written: {error.strerror or error}; make room, or choose "
            "another folder with run.folder=..."
        ) from error


def leave_unstarted(folder: Path) -> None:
    """Remove a folder in which nothing was written: a run that could not start leaves none behind."""
    try:
        folder.rmdir()
    except OSError:
        return


def on_first_rank(communicator: Communicator, action: Callable[[], Any]) -> Any:
    """Do something on rank 0; every rank gets its JSON result, or raises the same error of ours."""
    outcome: dict[str, Any] = {}
    if communicator.rank == 0:
        try:
            outcome = {"value": action()}
        except (ConfigError, CheckpointError) as error:
            outcome = {"error": str(error), "checkpoint": isinstance(error, CheckpointError)}
        except OSError as error:
            where = error.filename or "a file"
            text = f"{where}: {error.strerror or error}; look at its permissions and its disk"
            outcome = {"error": text, "checkpoint": False}
    outcome = communicator.broadcast_object(outcome)
    if "error" in outcome:
        raise (CheckpointError if outcome["checkpoint"] else ConfigError)(outcome["error"])
    return outcome["value"]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a JSON file in one step; where the disk refuses, the old one stays and nothing else."""
    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())


def write_exit(folder: Path, reason: str, step: int, *, resumable: bool, exit_code: int) -> None:
    """Say in ``EXIT.json`` how this attempt ended; rank 0 only.

    Launchers hide it: after SIGTERM ``deepspeed`` returns 1 or -15 whatever the ranks returned.

    Args:
        folder: of the run.
        reason: one of ``REASONS``.
        step: batches taken.
        resumable: whether the same command goes on from here.
        exit_code: what this process returns to its launcher.

    Raises:
        ValueError: for another reason.
        OSError: if the disk refuses; no half of a file is left.
    """
    if reason not in REASONS:
        raise ValueError(f"reason {reason!r} is none of {REASONS}")
    content = {
        "reason": reason,
        "step": step,
        "resumable": resumable,
        "exit_code": exit_code,
        "time": round(time.time(), 3),
    }
    # One line, as a shell's `cat` shows it.
    write_atomic(folder / EXIT_FILE, (json.dumps(content) + "\n").encode())


def clear_exit(folder: Path) -> None:
    """Remove ``EXIT.json`` at the start of an attempt: without it, the last attempt was killed."""
    (folder / EXIT_FILE).unlink(missing_ok=True)


def _inspect(config: RunConfig, folder: Path) -> dict[str, Any] | None:
    """What run.json says, None where there is no run yet.

    Raises:
        ConfigError: if the run cannot be in this folder.
    """
    another = "choose another folder with run.name=... or run.folder=..."
    try:
        # A folder in which nothing but a lock or an unfinished file lies is free.
        taken = folder.exists() and any(
            not path.name.startswith((LOCK_FILE, *_UNFINISHED)) for path in folder.iterdir()
        )
    except NotADirectoryError as error:
        raise ConfigError(f"run.folder={folder} is a file; {another}") from error
    if not taken:
        return None
    if not (folder / RUN_FILE).is_file():
        raise ConfigError(f"run.folder={folder} holds files, but no run ({RUN_FILE} is missing); {another}")
    if not config.run.resume:
        raise ConfigError(
            f"run.folder={folder} holds another run and run.resume=false; {another}, or continue that run "
            "with run.resume=true"
        )
    try:
        known: dict[str, Any] = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        changes = fixed_changes(known["fixed_settings"], fixed_settings(config))
        _ = known["run_uid"], int(known["attempts"]), known["tokenizer"], known["data_fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / RUN_FILE} cannot be read ({error!r}); {another}") from error
    if changes:
        lines = "\n  ".join(f"{key}: the run has {before}, now {after}" for key, before, after in changes)
        raise ConfigError(
            f"run.folder={folder} holds another run, which differs in what cannot change:\n  {lines}\n"
            f"give the same settings to continue it, or {another}"
        )
    _refuse_finished(config, folder, another)
    return known


def _refuse_finished(config: RunConfig, folder: Path, another: str) -> None:
    try:
        left = json.loads((folder / EXIT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if left.get("reason") == "finished" and left.get("step", 0) >= config.train.steps:
        raise ConfigError(
            f"run.folder={folder} holds a finished run of {left['step']} steps; raise train.steps (now "
            f"{config.train.steps}) to train it further, or {another}"
        )
