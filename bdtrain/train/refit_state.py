"""What a run keeps of its re-fits: in its checkpoints, in the history of earlier attempts, in its metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bdtrain.checkpoint.communicator import Communicator
from bdtrain.config import RunConfig
from bdtrain.errors import RefitError
from bdtrain.refit.history import RefitOutcome, read_history
from bdtrain.refit.schedule_file import MAX_BYTES
from bdtrain.refit.snapshot import refit_folder
from bdtrain.tracking.refits import gradient_metrics

_UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    StopIteration,
    AttributeError,
    RecursionError,
)
"""What a report that is none of ours may raise."""


@dataclass
class RefitState:
    """What a checkpoint keeps of the re-fits.

    Attributes:
        version: of the schedule in force; 0 is the configuration's plan.
        seen: samples and tokens taken when it was last asked whether a re-fit is due; None where a checkpoint
            does not say.
        pending: the one that is begun and not settled: snapshot step, the step it is due, digest.
        counts: outcomes so far, and ``skipped``: due while another one was pending.
        failures_in_a_row: of the last ones, those without a result.
        plans: (step, plan) of each plan that was in force, from its step on.
    """

    version: int = 0
    seen: dict[str, int] | None = field(default_factory=lambda: {"samples": 0, "tokens": 0})
    pending: dict[str, Any] | None = None
    counts: dict[str, int] = field(default_factory=dict)
    failures_in_a_row: int = 0
    plans: list[list[Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "version": self.version,
            "seen": None if self.seen is None else dict(self.seen),
            "pending": None if self.pending is None else dict(self.pending),
            "counts": dict(self.counts),
            "failures_in_a_row": self.failures_in_a_row,
        }

    def count(self, what: str) -> None:
        """One more of an outcome."""
        self.counts[what] = self.counts.get(what, 0) + 1


def load_history(config: RunConfig, communicator: Communicator) -> dict[int, RefitOutcome]:
    """What earlier attempts made of their re-fits, by snapshot step, on every rank.

    Args:
        config: of the run.
        communicator: the ranks; all must call this.

    Raises:
        RefitError: if the history is damaged, the same on all ranks.
    """
    if config.refit.replay == "live":
        return {}
    problem, found = "", {}
    if communicator.rank == 0:
        try:
            found = read_history(refit_folder(Path(config.run.folder)))
        except (OSError, RefitError) as error:
            problem = str(error)
    problem = communicator.broadcast_object(problem)
    if problem:
        raise RefitError(
            f"{problem}; without it this run cannot be repeated: mend the file, or set refit.replay=live"
        )
    records = communicator.broadcast_object([outcome.to_dict() for outcome in found.values()])
    outcomes = [RefitOutcome.from_dict(record) for record in records]
    return {outcome.snapshot_step: outcome for outcome in outcomes}


def search_metrics(report: Path, block_size: int) -> dict[str, float]:
    """Numbers of a search for the dashboards; none where the report cannot be read.

    Args:
        report: ``report.json`` of the re-fit.
        block_size: L' of the run.
    """
    try:
        if report.stat().st_size > MAX_BYTES:
            return {}
        record = json.loads(report.read_text(encoding="utf-8"))
        found = record["results"][str(block_size)]
        rows: Sequence[Mapping[str, Any]] = found["candidates"]
        current = next(row for row in rows if row["is_current"])
        winner = next(row for row in rows if row["name"] == found["winner"])
        values = {
            "sched/variance": current["variance"],
            "sched/variance_error": current["variance_error"],
            "sched/variance_best": winner["variance"],
            "sched/gain": found["gain"],
            "sched/p_best": winner["p_best"],
            "sched/at_edge": float(bool(found["at_edge"])),
            "sched/nelbo": found["nelbo"],
            "sched/nelbo_error": found["nelbo_error"],
            **gradient_metrics(record, block_size),
        }
        numbers = {name: float(value) for name, value in values.items() if value is not None}
    except _UNREADABLE:
        return {}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}
