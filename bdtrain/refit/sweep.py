"""A sweep: re-fits of many saved models for several block sizes, told as one table.

OUT/NAME          results of each checkpoint, as of any re-fit; of a single one they lie in OUT itself
OUT/sweep.json    the table, written again after each checkpoint

A checkpoint that fails is told, and the sweep goes on with the next one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdtrain.errors import BdtrainError, RefitError, report_failure
from bdtrain.files import write_atomic
from bdtrain.tracking.mlflow import FAILED, FINISHED, KILLED, NestedRun, NestedRuns, quiet_environment
from bdtrain.tracking.pictures import draw_refit
from bdtrain.tracking.refits import Plot, plot_variance
from bdtrain.tracking.refits import Refit as ShownRefit
from bdtrain.tracking.run_files import REFIT_REPORT
from bdtrain.tracking.spool import Point, redact

if TYPE_CHECKING:
    from bdtrain.refit.job import Refit
    from bdtrain.refit.search import SearchResult

SWEEP_FILE = "sweep.json"
SWEEP_FORMAT = "bdtrain-refit-sweep/1"

EXPERIMENT = "bdtrain-sweeps"
"""Of MLflow: not the one of the runs, whose table would be full of sweeps."""

PARENT = "sweep"
NAME_PARTS = 3
NOTE_ROWS, NOTE_CHARACTERS = 25, 4000
_STEPS_PER_RANGE = 1000

Refitter = Callable[[Path, Path], "Refit"]
"""From a checkpoint and the folder of its results to what came of it."""


@dataclass(frozen=True)
class SweepRow:
    """What was found for one checkpoint and one block size.

    Variances are those of a block's loss per token, nats^2/token^2, under the draws that the plan takes.

    Attributes:
        checkpoint: as it was given.
        folder: of its results.
        run_uid: of the run that wrote it.
        step: batches that it had taken.
        block_size: L'.
        current: the plan that it was trained with.
        winner: the plan of least variance.
        adopt: whether the winner is better by enough, and beyond chance.
        at_edge: edges of the grid at which the winner lies.
        strata: ``stratified`` or ``independent``: which draws.
        variance: of the current plan.
        variance_error: its standard error; None for independent draws.
        variance_best: of the winner.
        variance_best_error: its standard error.
        gain: by which share the current plan's criterion is larger; None where that has no value.
        p_best: share of bootstrap draws in which no plan was better than the winner.
        nelbo: full bound, nats/token.
        nelbo_error: its standard error.
        blocks: measured.
        sequences: rows measured.
    """

    checkpoint: str
    folder: str
    run_uid: str
    step: int
    block_size: int
    current: str
    winner: str
    adopt: bool
    at_edge: tuple[str, ...]
    strata: str
    variance: float | None
    variance_error: float | None
    variance_best: float | None
    variance_best_error: float | None
    gain: float | None
    p_best: float | None
    nelbo: float | None
    nelbo_error: float | None
    blocks: int
    sequences: int


def run_sweep(
    checkpoints: Sequence[Path], out: Path, refit: Refitter, *, mlflow_uri: str | None = None
) -> int:
    """Re-fit each checkpoint, one after another, and tell all results in one table.

    Args:
        checkpoints: folders of saved models.
        out: where the results go.
        refit: makes one re-fit.
        mlflow_uri: store that gets a run with one nested run for each checkpoint and block size; None: none.

    Returns:
        The exit code: 0, or that of the first checkpoint that failed.

    Raises:
        RefitError: if a checkpoint is given twice.
        OSError: if the table cannot be written.
    """
    sweep = Sweep(checkpoints, out, SweepRuns(mlflow_uri, len(checkpoints)) if mlflow_uri else None)
    try:
        for checkpoint in checkpoints:
            sweep.refit(checkpoint, refit)
    except BaseException:
        sweep.end(complete=False)
        raise
    sweep.end(complete=True)
    return sweep.exit_code


class Sweep:
    """The table of a sweep while it grows.

    Args:
        checkpoints: folders of saved models.
        out: where the results go.
        runs: what shows them in MLflow; None: nothing does.

    Attributes:
        rows: the table.
        failures: of checkpoints that came to nothing.
        exit_code: of the first of them; 0 if there is none.

    Raises:
        RefitError: if a checkpoint is given twice.
    """

    def __init__(self, checkpoints: Sequence[Path], out: Path, runs: SweepRuns | None) -> None:
        self._names = dict(zip(checkpoints, result_names(checkpoints), strict=True))
        self._out, self._runs = out, runs
        self.rows: list[SweepRow] = []
        self.failures: list[dict[str, Any]] = []
        self.exit_code = 0

    def refit(self, checkpoint: Path, refit: Refitter) -> None:
        """Re-fit one checkpoint; a failure is told and noted."""
        name = self._names[checkpoint]
        folder = self._out / name if len(self._names) > 1 else self._out
        began = time.time()
        try:
            done = refit(checkpoint, folder)
        except (BdtrainError, OSError) as error:
            code = report_failure(error)
            self.exit_code = self.exit_code or code
            self.failures.append({"checkpoint": str(checkpoint), "error": str(error), "exit_code": code})
            if self._runs is not None:
                self._runs.add([failed_run(checkpoint, name, str(error), began)])
        else:
            rows = [make_row(checkpoint, done, result) for result in done.results.values()]
            self.rows += rows
            if self._runs is not None:
                results = zip(rows, done.results.values(), strict=True)
                self._runs.add([nested_run(row, name, result, began) for row, result in results])
        self._write(complete=False)

    def end(self, *, complete: bool) -> None:
        """Write, print and show the table.

        Args:
            complete: whether every checkpoint had its turn.
        """
        self._write(complete=complete)
        if self.rows:
            print(format_table(self.rows))
        if self.failures:
            failed = ", ".join(failure["checkpoint"] for failure in self.failures)
            print(f"{len(self.failures)} of {len(self._names)} checkpoints came to nothing: {failed}")
        if self._file.exists():
            print(f"wrote {self._file}", flush=True)
        if self._runs is not None:
            status = FINISHED if complete and not self.failures else FAILED if complete else KILLED
            self._runs.end(status, self.rows, self._file)

    @property
    def _file(self) -> Path:
        return self._out / SWEEP_FILE

    def _write(self, *, complete: bool) -> None:
        # A single checkpoint that fails leaves no folder behind, as a re-fit that fails leaves none.
        if not self.rows and len(self._names) == 1:
            return
        record = {
            "format": SWEEP_FORMAT,
            "complete": complete,
            "checkpoints": [str(checkpoint) for checkpoint in self._names],
            "rows": [asdict(row) for row in self.rows],
            "failures": self.failures,
        }
        self._out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n"
        write_atomic(self._file, text.encode())


def result_names(checkpoints: Sequence[Path]) -> list[str]:
    """Names of the folders of results: the last parts of each path, as many as tell them apart.

    Args:
        checkpoints: folders of saved models.

    Raises:
        RefitError: if one is given twice.
    """
    places = [checkpoint.resolve() for checkpoint in checkpoints]
    twice = sorted({str(place) for place in places if places.count(place) > 1})
    if twice:
        raise RefitError(f"--checkpoint {', '.join(twice)} is given twice; give each one once")
    # Without the root, whose name is no part of a name.
    parts = [place.parts[1:] for place in places]
    for length in range(NAME_PARTS, max([NAME_PARTS, *map(len, parts)]) + 1):
        names = ["-".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    raise RefitError(
        f"results of {', '.join(map(str, places))} would lie in one folder; sweep them one at a time"
    )


def make_row(checkpoint: Path, refit: Refit, result: SearchResult) -> SweepRow:
    """The row of one search.

    Args:
        checkpoint: that was measured.
        refit: of all block sizes.
        result: of the one.
    """
    from bdtrain.refit.search import plain_values

    current = result.candidates[0]
    winner = next(one for one in result.candidates if one.name == result.winner)
    independent = result.strata == "independent"
    # To ten digits, as in the report, and None for what is not finite.
    values = plain_values(
        {
            "variance": current.independent_variance if independent else current.variance,
            "variance_error": None if independent else current.variance_error,
            "variance_best": winner.independent_variance if independent else winner.variance,
            "variance_best_error": None if independent else winner.variance_error,
            "gain": result.gain,
            "p_best": winner.p_best,
            "nelbo": result.nelbo,
            "nelbo_error": result.nelbo_error,
        }
    )
    return SweepRow(
        checkpoint=str(checkpoint),
        folder=str(refit.folder),
        run_uid=refit.schedule.run_uid,
        step=refit.schedule.snapshot_step,
        block_size=result.current.block_size,
        current=current.name,
        winner=winner.name,
        adopt=result.adopt,
        at_edge=tuple(result.at_edge),
        strata=result.strata,
        blocks=result.blocks,
        sequences=result.sequences,
        **values,
    )


# -- The table for people ------------------------------------------------------------------------------------

HEADER = tuple(
    "checkpoint,step,L',trained with,best,adopt,variance,of the best,gain,P(best),NELBO".split(",")
)


def table_cells(row: SweepRow) -> list[str]:
    """A row as people read it, in the order of the header."""
    return [
        "/".join(Path(row.checkpoint).parts[-2:]),
        f"{row.step:,}",
        str(row.block_size),
        row.current.removeprefix("current (").removesuffix(")"),
        row.winner.removeprefix("current (").removesuffix(")"),
        "yes" if row.adopt else "no",
        _with_error(row.variance, row.variance_error),
        _with_error(row.variance_best, row.variance_best_error),
        "-" if row.gain is None else f"{row.gain:.1%}",
        "-" if row.p_best is None else f"{row.p_best:.2f}",
        _with_error(row.nelbo, row.nelbo_error),
    ]


def format_table(rows: Sequence[SweepRow]) -> str:
    """The table as text, columns aligned."""
    lines = [HEADER, *map(table_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def format_note(rows: Sequence[SweepRow]) -> str:
    """The table as Markdown, the first rows of it: MLflow shows it as the description of a run."""
    lines = [HEADER, ("---",) * len(HEADER), *map(table_cells, rows[:NOTE_ROWS])]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    left = len(rows) - NOTE_ROWS
    return text + (f"\n\nand {left} more in {SWEEP_FILE}" if left > 0 else "")


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" + ("" if error is None else f" +- {error:.2g}")


# -- MLflow --------------------------------------------------------------------------------------------------


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


def nested_run(row: SweepRow, name: str, result: SearchResult, began: float) -> NestedRun:
    """The run of one checkpoint and block size.

    Args:
        row: of the table.
        name: of the checkpoint's results.
        result: the search.
        began: seconds since 1970 at which the re-fit began.
    """
    record = result.to_dict()
    now_ms = round(time.time() * 1000)
    points = [Point(name, value, now_ms, row.step) for name, value in _metrics(row).items()]
    plot = plot_variance(record, row.block_size)

    def draw(aside: Path) -> list[Path]:
        shown = ShownRefit(row.step, None, f"{row.winner} is best", results={row.block_size: record})
        try:
            return draw_refit(shown, aside / f"variance-L{row.block_size}")
        except Exception as error:
            print(f"no picture of {name}, block size {row.block_size}: {error!r}", flush=True)
            return []

    return NestedRun(
        name=f"{name}-L{row.block_size}",
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
