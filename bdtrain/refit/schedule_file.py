"""schedule.json: what a re-fit decided, in a form that a trainer can trust.

Written whole or not at all, with the digest of its own content, and tied to one run, one snapshot and the
plan that was in use. The same snapshot and settings give the same bytes, whoever makes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bdtrain.diffusion.plan import NoisePlan
from bdtrain.errors import BdtrainError, RefitError
from bdtrain.files import write_atomic

SCHEDULE_FILE = "schedule.json"
REPORT_FILE = "report.json"
FORMAT = "bdtrain-schedule/1"
MAX_BYTES = 1 << 24
"""No schedule is larger; a file that is, is not read."""

MAX_REASON = 2000
"""Characters of a reason: it is told on the console."""


@dataclass(frozen=True)
class Decision:
    """The outcome for one block size.

    Attributes:
        plan: to be used: a new one, or the one in use.
        adopt: whether it is new.
        reason: why, in one sentence.
    """

    plan: NoisePlan
    adopt: bool
    reason: str


@dataclass(frozen=True)
class Schedule:
    """What a re-fit decided.

    Attributes:
        run_uid: of the run whose snapshot was measured.
        snapshot_step: its step.
        snapshot_sha256: of its manifest; empty where the weights were measured in memory.
        based_on: digest of the plan that was in use (``plan_digest``).
        version: number of this result among those of the run, from 1.
        decisions: by block size.
    """

    run_uid: str
    snapshot_step: int
    snapshot_sha256: str
    based_on: str
    version: int
    decisions: Mapping[int, Decision]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the digest of the rest."""
        body = {
            "format": FORMAT,
            "run_uid": self.run_uid,
            "snapshot_step": self.snapshot_step,
            "snapshot_sha256": self.snapshot_sha256,
            "based_on": self.based_on,
            "version": self.version,
            "decisions": {
                str(size): {"plan": made.plan.to_dict(), "adopt": made.adopt, "reason": made.reason}
                for size, made in sorted(self.decisions.items())
            },
        }
        return {**body, "sha256": _digest(body)}


def plan_digest(plan: NoisePlan) -> str:
    """SHA-256 of a plan."""
    return _digest(plan.to_dict())


def write_schedule(folder: Path, schedule: Schedule) -> Path:
    """Write ``schedule.json`` into a folder, whole or not at all.

    Raises:
        OSError: if the disk refuses.
    """
    path = folder / SCHEDULE_FILE
    write_atomic(path, (json.dumps(schedule.to_dict(), indent=1, sort_keys=True) + "\n").encode())
    return path


def read_schedule(path: Path) -> Schedule:
    """Read a schedule, trusting nothing.

    Raises:
        RefitError: if it is missing, torn, of another format or altered, or a plan in it cannot be drawn.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RefitError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) > MAX_BYTES:
        raise RefitError(f"{path} is larger than {MAX_BYTES} bytes; it is no schedule")
    try:
        record = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
        found = record.get("format")
        if found != FORMAT:
            raise RefitError(f"{path} has format {found!r}; this version reads {FORMAT!r}")
        if record.pop("sha256") != _digest(record):
            raise RefitError(f"{path}: its content is not what its digest says; it was altered or torn")
        return Schedule(
            run_uid=str(record["run_uid"]),
            snapshot_step=_whole(record["snapshot_step"]),
            snapshot_sha256=str(record["snapshot_sha256"]),
            based_on=str(record["based_on"]),
            version=_whole(record["version"]),
            decisions={int(size): _read_decision(made) for size, made in record["decisions"].items()},
        )
    except RefitError:
        raise
    except BdtrainError as error:
        raise RefitError(f"{path} holds a plan that cannot be drawn: {error}") from error
    except (ValueError, KeyError, TypeError, ArithmeticError, AttributeError, RecursionError) as error:
        raise RefitError(f"{path} is no schedule ({error!r})") from error


def check_schedule(
    schedule: Schedule,
    *,
    run_uid: str,
    snapshot_step: int,
    snapshot_sha256: str,
    version: int,
    current: NoisePlan,
) -> Decision:
    """The decision of a schedule for a run's block size, if the schedule is the one that is awaited.

    Args:
        schedule: what was read.
        run_uid: of the run.
        snapshot_step: of the snapshot that was to be measured.
        snapshot_sha256: of its manifest; empty for none.
        version: that the schedule must have.
        current: the plan in use.

    Raises:
        RefitError: naming everything that differs.
    """
    wanted: dict[str, tuple[object, object]] = {
        "run": (schedule.run_uid, run_uid),
        "snapshot step": (schedule.snapshot_step, snapshot_step),
        "snapshot digest": (schedule.snapshot_sha256, snapshot_sha256),
        "version": (schedule.version, version),
        "plan in use": (schedule.based_on, plan_digest(current)),
    }
    problems = [
        f"{name} {found!r}, expected {expected!r}"
        for name, (found, expected) in wanted.items()
        if found != expected
    ]
    decision = schedule.decisions.get(current.block_size)
    if decision is None:
        sizes = ", ".join(map(str, sorted(schedule.decisions))) or "none"
        problems.append(f"no plan for block size {current.block_size} (it has {sizes})")
    elif decision.plan.block_size != current.block_size:
        problems.append(f"a plan for block size {decision.plan.block_size} under {current.block_size}")
    elif replace(decision.plan, clip_range=current.clip_range, density=current.density) != current:
        problems.append("a plan that differs in more than its range and its density")
    elif not decision.adopt and decision.plan != current:
        problems.append("a plan that is not the one in use, and yet not new")
    if problems or decision is None:
        raise RefitError(f"a schedule of another re-fit: {'; '.join(problems)}")
    return decision


def _read_decision(record: Mapping[str, Any]) -> Decision:
    adopt, reason, plan = record["adopt"], record["reason"], record["plan"]
    if not isinstance(adopt, bool) or not isinstance(reason, str):
        raise TypeError("adopt must be true or false, and reason a text")
    if len(reason) > MAX_REASON or not reason.isprintable():
        raise ValueError(f"reason must be one printable line of at most {MAX_REASON} characters")
    # Python counts with 4.0 and true as well, until a table is to have that many rows.
    _whole(plan["block_size"])
    if not isinstance(plan.get("resample", False), bool):
        raise TypeError("resample must be true or false")
    return Decision(NoisePlan.from_dict(plan), adopt, reason)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"{value!r} is no whole number")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of a schedule")


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
