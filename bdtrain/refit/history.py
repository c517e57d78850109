"""What became of every re-fit of a run, in the order of the steps at which it took effect.

RUN/refit/history.jsonl, one line each, written and synced before the first step that depends on it: a run
that is continued from an earlier checkpoint uses the same plans at the same steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bdtrain.diffusion.plan import NoisePlan
from bdtrain.errors import ConfigError, RefitError
from bdtrain.files import append_line

HISTORY_FILE = "history.jsonl"

OUTCOMES = ("adopted", "kept", "late", "failed", "rejected")
"""``adopted`` and ``kept`` came in time; ``late`` did not; ``failed`` came to nothing; ``rejected`` was a
schedule that could not be used."""


@dataclass(frozen=True)
class RefitOutcome:
    """How a re-fit ended for the trainer.

    Attributes:
        snapshot_step: of the snapshot that was measured.
        adopt_step: batches taken when its plan took effect, or would have.
        outcome: one of ``OUTCOMES``.
        reason: in one sentence.
        version: of the schedule in force afterwards.
        plan: in force afterwards.
        metrics: numbers of the search, by metric name; empty without one.
        loss_scale: of a plan that is adopted, by how much it changes the scale of the loss
            (``bdtrain.diffusion.tables.loss_scale``); 1 for any other.
    """

    snapshot_step: int
    adopt_step: int
    outcome: str
    reason: str
    version: int
    plan: NoisePlan
    metrics: Mapping[str, float] = field(default_factory=dict)
    loss_scale: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "metrics": dict(self.metrics), "plan": self.plan.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> RefitOutcome:
        """Back from ``to_dict``.

        Raises:
            RefitError: if it is no such record.
        """
        try:
            if record["outcome"] not in OUTCOMES:
                raise ValueError(f"outcome {record['outcome']!r}")
            return cls(
                snapshot_step=int(record["snapshot_step"]),
                adopt_step=int(record["adopt_step"]),
                outcome=str(record["outcome"]),
                reason=str(record["reason"]),
                version=int(record["version"]),
                plan=NoisePlan.from_dict(record["plan"]),
                metrics={str(name): float(value) for name, value in record["metrics"].items()},
                # Histories of earlier versions do not have it.
                loss_scale=float(record.get("loss_scale", 1.0)),
            )
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, ConfigError) as error:
            raise RefitError(f"a line of {HISTORY_FILE} is no outcome of a re-fit ({error!r})") from error


def append_outcome(folder: Path, outcome: RefitOutcome) -> None:
    """Write a line and wait until it is on disk.

    Args:
        folder: of the run's re-fits; made if it is not there.
        outcome: to write.

    Raises:
        OSError: if the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(outcome.to_dict(), sort_keys=True, allow_nan=False)
    # Whole or not at all: the caller goes on without what was refused, and a restart must not find it.
    append_line(folder / HISTORY_FILE, text, sync=True)


def read_history(folder: Path) -> dict[int, RefitOutcome]:
    """The last outcome of each snapshot step; a torn line is left out.

    Args:
        folder: of the run's re-fits; need not exist.

    Raises:
        OSError: if the file is there and cannot be read.
        RefitError: if a whole line is none of ours.
    """
    try:
        lines = (folder / HISTORY_FILE).read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    found: dict[int, RefitOutcome] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        outcome = RefitOutcome.from_dict(record)
        found[outcome.snapshot_step] = outcome
    return found
