"""A sweep in MLflow: one run, and one nested in it for each checkpoint and block size."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bdtrain.refit.sweep_table import NOTE_CHARACTERS, SweepRow, format_note
from bdtrain.tracking.json_files import section
from bdtrain.tracking.mlflow import FAILED, FINISHED, NestedRun, NestedRuns, quiet_environment
from bdtrain.tracking.pictures import draw_refit
from bdtrain.tracking.refits import Plot, by_size, gradient_metrics, plot_variance
from bdtrain.tracking.refits import Refit as ShownRefit
from bdtrain.tracking.run_files import REFIT_REPORT
from bdtrain.tracking.spool import Point, redact

EXPERIMENT = "bdtrain-sweeps"
"""Of MLflow: not the one of the runs, whose table would be full of sweeps."""

PARENT = "sweep"
_STEPS_PER_RANGE = 1000


class SweepRuns:
    """The runs of a sweep in MLflow, as far as its server takes them.

    What it does not take waits for the next checkpoint, and in the end costs a line: all is in the folder.

    Args:
        uri: address of the store.
        checkpoints: number of them.
    """

    def __init__(self, uri: str, checkpoints: int) -> None:
        self._uri, self._checkpoints = uri, checkpoints
        self._store: NestedRuns | None = None
        self._waiting: list[NestedRun] = []
        self._problem = ""

    def add(self, runs: Sequence[NestedRun]) -> None:
        """Show more."""
        self._waiting += runs
        self._try(self._send)

    def end(self, status: str, rows: Sequence[SweepRow], table: Path) -> None:
        """Show what is left, and the whole.

        Args:
            status: of the sweep.
            rows: of its table.
            table: its file, if it was written.
        """

        def finish() -> None:
            store = self._send()
            store.finish(
                status,
                params={"checkpoints": self._checkpoints},
                metrics=parent_points(rows),
                tags={"mlflow.note.content": format_note(rows)},
                files=[table] if table.exists() else [],
            )

        if self._try(finish):
            assert self._store is not None
            print(f"MLflow: run {self._store.run_id} in {redact(self._uri, os.environ)}", flush=True)
        else:
            left = f"{len(self._waiting)} runs and " if self._waiting else ""
            print(f"MLflow: {left}the end of the sweep could not be stored ({self._problem})", flush=True)

    def _send(self) -> NestedRuns:
        if self._store is None:
            os.environ.update(quiet_environment())
            self._store = NestedRuns(self._uri, EXPERIMENT, PARENT)
        while self._waiting:
            self._store.log(self._waiting[0])
            del self._waiting[0]
        return self._store

    def _try(self, action: Callable[[], object]) -> bool:
        try:
            action()
        except Exception as error:
            problem = redact(f"{type(error).__name__}: {error}", os.environ).split("\n")[0][:160]
            if not self._problem:
                print(f"MLflow: {redact(self._uri, os.environ)} takes nothing now: {problem}", flush=True)
            self._problem = problem
            return False
        return True


def nested_run(row: SweepRow, name: str, report: Mapping[str, Any], began: float) -> NestedRun:
    """The run of one checkpoint and block size.

    Args:
        row: of the table.
        name: of the checkpoint's results.
        report: of the re-fit.
        began: seconds since 1970 at which the re-fit began.
    """
    now_ms = round(time.time() * 1000)
    size = row.block_size
    metrics = {**_metrics(row), **gradient_metrics(report, size)}
    points = [Point(name, value, now_ms, row.step) for name, value in metrics.items()]
    record = section(section(report, "results"), str(size))
    gradients = by_size(section(report, "gradients")).get(size)
    plot = plot_variance(record, size)

    def draw(aside: Path) -> list[Path]:
        shown = ShownRefit(
            row.step,
            None,
            f"{row.winner} is best",
            results={size: record},
            gradients={} if gradients is None else {size: gradients},
        )
        try:
            return draw_refit(shown, aside / f"variance-L{size}")
        except Exception as error:
            print(f"no picture of {name}, block size {size}: {error!r}", flush=True)
            return []

    return NestedRun(
        name=f"{name}-L{size}",
        status=FINISHED,
        began_ms=round(began * 1000),
        params={
            **{name: getattr(row, name) for name in ("checkpoint", "step", "block_size", "winner", "adopt")},
            "trained_with": row.current,
            "at_edge": ", ".join(row.at_edge) or "no",
            "blocks": row.blocks,
        },
        metrics=(*points, *(range_points(plot, now_ms) if plot is not None else ())),
        tags={"bdtrain.sweep_of": row.run_uid} if row.run_uid else {},
        files=(Path(row.folder) / REFIT_REPORT,),
        draw=draw,
    )


def failed_run(checkpoint: Path, name: str, error: str, began: float) -> NestedRun:
    """The run of a checkpoint that came to nothing; the arguments are those of ``nested_run``."""
    return NestedRun(
        name=name,
        status=FAILED,
        began_ms=round(began * 1000),
        params={"checkpoint": str(checkpoint)},
        tags={"mlflow.note.content": error[:NOTE_CHARACTERS]},
    )


def range_points(plot: Plot, time_ms: int) -> list[Point]:
    """Variance by range as metrics: one for each width, its steps the lower bounds in thousandths.

    So MLflow draws variance against range, and lays the curves of several checkpoints over each other.

    Args:
        plot: of the search.
        time_ms: of the points, since 1970.
    """
    values = [
        (series.name, value, error, round(_STEPS_PER_RANGE * start))
        for series in plot.series
        for start, value, error in series.points
    ]
    values += [(name, value, error, 0) for name, value, error in plot.levels]
    points = []
    for name, value, error, step in values:
        metric = "range/" + "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)
        points.append(Point(metric, value, time_ms, step))
        if error is not None:
            points.append(Point(f"{metric}_error", error, time_ms, step))
    return points


def parent_points(rows: Sequence[SweepRow]) -> list[Point]:
    """How the results move with the step, for each block size; nothing for checkpoints of several runs.

    Args:
        rows: of the table.
    """
    # Of two runs the same step would be there twice.
    if len({row.run_uid for row in rows}) != 1 or len({(row.step, row.block_size) for row in rows}) != len(
        rows
    ):
        return []
    now_ms = round(time.time() * 1000)
    return [
        Point(f"sched_L{row.block_size}/{name.removeprefix('sched/')}", value, now_ms, row.step)
        for row in sorted(rows, key=lambda row: (row.block_size, row.step))
        for name, value in _metrics(row).items()
    ]


def _metrics(row: SweepRow) -> dict[str, float]:
    """The numbers of a row under the names that a run's own re-fits have."""
    values = {
        "sched/variance": row.variance,
        "sched/variance_error": row.variance_error,
        "sched/variance_best": row.variance_best,
        "sched/gain": row.gain,
        "sched/p_best": row.p_best,
        "sched/at_edge": float(bool(row.at_edge)),
        "sched/nelbo": row.nelbo,
        "sched/nelbo_error": row.nelbo_error,
    }
    return {name: value for name, value in values.items() if value is not None}
