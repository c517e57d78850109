"""A sweep: re-fits of many saved models for several block sizes, told as one table.

OUT/NAME          results of each checkpoint, as of any re-fit; of a single one they lie in OUT itself
OUT/sweep.json    the table, written again after each checkpoint

A checkpoint that fails is told, and the sweep goes on with the next one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bdtrain.errors import BdtrainError, RefitError, report_failure
from bdtrain.files import write_atomic
from bdtrain.refit.sweep_runs import SweepRuns, failed_run, nested_run
from bdtrain.refit.sweep_table import SWEEP_FILE, SweepRow, format_table, read_rows
from bdtrain.tracking.mlflow import FAILED, FINISHED, KILLED

SWEEP_FORMAT = "bdtrain-refit-sweep/1"
NAME_PARTS = 3

Refitter = Callable[[Path, Path], object]
"""Re-fits a checkpoint and leaves the results in a folder."""


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
            refit(checkpoint, folder)
            found = read_rows(checkpoint, folder)
        except (BdtrainError, OSError) as error:
            code = report_failure(error)
            self.exit_code = self.exit_code or code
            self.failures.append({"checkpoint": str(checkpoint), "error": str(error), "exit_code": code})
            if self._runs is not None:
                self._runs.add([failed_run(checkpoint, name, str(error), began)])
        else:
            self.rows += [row for row, _ in found]
            if self._runs is not None:
                self._runs.add([nested_run(row, name, report, began) for row, report in found])
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
