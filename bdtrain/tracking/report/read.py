"""What a report is made from: the files of a run's folder; what is missing or torn is left out."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bdtrain.errors import ConfigError
from bdtrain.tracking.json_files import (
    number,
    parse_json,
    parse_yaml,
    read_json,
    read_tail,
    read_text,
    section,
)
from bdtrain.tracking.report.columns import Metrics, read_columns
from bdtrain.tracking.run_files import (
    CHECKPOINTS,
    CONFIG_FILE,
    EXIT_FILE,
    LOCK_FILE,
    METRICS_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    SUMMARY_FILE,
)

HEARTBEAT_STALE_S = 30.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MAX_SAMPLES = 20


@dataclass
class Run:
    """Everything a report says of a run.

    Attributes:
        folder: of the run.
        metrics: the metrics file.
        state: how it stands, in one word: ``finished``, ``stopped``, ``failed``, ``running`` or ``killed``.
        sentence: the same in plain words.
        config: the resolved configuration, empty where it cannot be read.
        config_text: as written.
        facts: ``run.json``.
        summary: ``summary.json``; empty before the end.
        exit: ``EXIT.json``.
        evaluations: ``evaluation*.json`` in the folder and beside it, by file name.
        samples: the last lines of ``samples.jsonl``.
        goodput: seconds by activity, and of what it speaks.
        checkpoints: names of the training checkpoints on the disk.
    """

    folder: Path
    metrics: Metrics
    state: str = "killed"
    sentence: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    exit: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    goodput: tuple[dict[str, float], str] = field(default_factory=lambda: ({}, ""))
    checkpoints: list[str] = field(default_factory=list)


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Args:
        folder: of a run that is finished, stopped, killed or at work.

    Raises:
        ConfigError: if the folder holds no run.
        OSError: if its metrics file is there and cannot be read.
    """
    if not (folder / METRICS_FILE).is_file() and not (folder / RUN_FILE).is_file():
        what = "holds no run" if folder.is_dir() else "is no folder"
        raise ConfigError(
            f"{folder} {what}: it has neither {METRICS_FILE} nor {RUN_FILE}; give the folder that "
            "run.folder named, for example runs/quickstart/run"
        )
    run = Run(folder, read_columns(folder / METRICS_FILE))
    run.config_text = read_text(folder / CONFIG_FILE)
    run.config = parse_yaml(run.config_text)
    run.facts, run.summary = read_json(folder / RUN_FILE), read_json(folder / SUMMARY_FILE)
    run.exit = read_json(folder / EXIT_FILE)
    if run.exit.get("reason") != "finished":
        run.summary = {}  # of an earlier end: the run was continued since
    run.state, run.sentence = _describe_state(run)
    run.evaluations = _read_evaluations(folder)
    run.samples = _read_samples(folder / SAMPLES_FILE)
    run.checkpoints = _names(folder / CHECKPOINTS, "step-*")
    run.goodput = _read_goodput(run)
    return run


def utc(seconds: float) -> time.struct_time:
    """A time of the metrics file; 1970 where it is none."""
    try:
        return time.gmtime(seconds)
    except (OverflowError, ValueError, OSError):
        return time.gmtime(0)


def _names(folder: Path, pattern: str) -> list[str]:
    try:
        return sorted(path.name for path in folder.glob(pattern))
    except OSError:
        return []


def _describe_state(run: Run) -> tuple[str, str]:
    """How the run stands, from EXIT.json, else from the last event, else from the lock."""
    ended, last = run.exit, run.metrics.events[-1] if run.metrics.events else {}
    reason, step = str(ended.get("reason", "")), number(ended, "step")
    if not reason and last.get("event") in ("end", "stop", "failed"):
        # The disk was too full for EXIT.json, but not for the line.
        reason, step = str(last.get("reason") or last["event"]), last["step"]
    at = f" at step {round(step):,}" if step is not None else ""
    failed = last.get("event") == "failed"
    if reason in ("finished", "end"):
        return "finished", f"Finished{at}."
    if reason in ("nonfinite", "error", "failed") or failed:
        why = str(last.get("error") or "") if failed else ""
        words = "too many steps in a row were not finite" if reason == "nonfinite" else "an error"
        return "failed", f"Ended{at} by {words}{f': {why}' if why else ''}."
    if reason:
        return "stopped", f"Stopped by {reason}{at} and saved; the same command continues the run."
    when = run.metrics.last_time
    seen = f", last heard of at step {run.metrics.last_step:,}" if when is not None else ""
    if _is_alive(run.folder / LOCK_FILE):
        return "running", f"Running{seen}."
    kept = _names(run.folder / CHECKPOINTS, "step-*")
    then = f"continues from {kept[-1]}" if kept else "begins anew: there is no checkpoint"
    return "killed", f"Killed without notice{seen}; the same command {then}."


def _is_alive(lock: Path) -> bool:
    """Whether the trainer that holds a run's folder still lives; the lock itself is not touched."""
    try:
        age_s = time.time() - lock.stat().st_mtime
        owner = json.loads(lock.read_text(encoding="utf-8"))
        here = BOOT_ID.read_text(encoding="ascii").strip() if BOOT_ID.exists() else None
        if isinstance(owner, dict) and owner.get("machine") == here:
            with contextlib.suppress(PermissionError):  # another user's process lives, too
                os.kill(int(owner["pid"]), 0)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return age_s < HEARTBEAT_STALE_S


def _read_evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    """``evaluation*.json`` in the folder; beside it those whose weights are this run's."""
    found: dict[str, dict[str, Any]] = {}
    folder = folder.resolve()
    for place in (folder, folder.parent):
        for name in _names(place, "evaluation*.json"):
            content = read_json(place / name)
            ours = place == folder or _is_of_run(section(content, "manifest").get("checkpoint"), folder)
            if number(content, "nelbo") is not None and ours:
                found.setdefault(name, content)
    return found


def _is_of_run(checkpoint: object, folder: Path) -> bool:
    """Whether weights are a run's: RUN/checkpoint or RUN/checkpoints/step-N."""
    if not checkpoint:
        return False
    weights = Path(str(checkpoint))
    try:
        if weights.exists():
            return weights.resolve().is_relative_to(folder)
    except (OSError, ValueError):
        pass
    # The run was moved, or the path was relative: the names of its folder and of the one above must do.
    return folder.parts[-2:] in (weights.parts[-3:-1], weights.parts[-4:-2])


def _read_samples(path: Path) -> list[dict[str, Any]]:
    """The last samples; a torn line is left out."""
    samples = []
    for line in read_tail(path)[-MAX_SAMPLES - 1 :]:
        sample = parse_json(line)
        words = sample.get("text")
        if isinstance(words, str) and words.strip():  # synthetic data has no words
            samples.append(sample)
    return samples


def _read_goodput(run: Run) -> tuple[dict[str, float], str]:
    """Seconds by activity: of the whole run at its end, else up to the newest checkpoint."""
    spent = section(run.summary, "goodput")
    if spent:
        keys = [key for key in spent if key.endswith("_seconds") and key != "wall_seconds"]
        found = {key.removesuffix("_seconds"): number(spent, key) for key in keys}
        return {key: value for key, value in found.items() if value is not None}, "of the whole run"
    for name in reversed(run.checkpoints):
        saved = section(read_json(run.folder / CHECKPOINTS / name / "state.json"), "goodput")
        spent = section(saved, "seconds")
        if spent:
            found = {key: number(spent, key) for key in spent}
            values = {key: value for key, value in found.items() if value is not None}
            return values, f"up to the checkpoint {name}"
    return {}, ""
