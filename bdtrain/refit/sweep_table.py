"""The table of a sweep: a row for each checkpoint and block size, as text and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdtrain.errors import RefitError
from bdtrain.refit.schedule_file import REPORT_FILE

SWEEP_FILE = "sweep.json"
NOTE_ROWS, NOTE_CHARACTERS = 25, 4000


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


def read_rows(checkpoint: Path, folder: Path) -> list[tuple[SweepRow, Mapping[str, Any]]]:
    """The rows of one checkpoint, from the report of its re-fit, by block size.

    Args:
        checkpoint: that was measured, as it was given.
        folder: of its results.

    Returns:
        Each row, and the report that it stands in.

    Raises:
        RefitError: if the report cannot be read.
    """
    try:
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        results = {int(size): result for size, result in report["results"].items()}
        return [(_row(checkpoint, folder, report, size, results[size]), report) for size in sorted(results)]
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise RefitError(
            f"{folder / REPORT_FILE} cannot be read ({error!r}); make this re-fit again"
        ) from error


def _row(
    checkpoint: Path, folder: Path, report: Mapping[str, Any], size: int, result: Mapping[str, Any]
) -> SweepRow:
    """The row of one search; numbers are those of the report, to ten digits, None where one is not finite."""
    current = result["candidates"][0]
    winner = next(one for one in result["candidates"] if one["name"] == result["winner"])
    independent = result["strata"] == "independent"
    variance = "independent_variance" if independent else "variance"
    return SweepRow(
        checkpoint=str(checkpoint),
        folder=str(folder),
        run_uid=report["run_uid"],
        step=report["snapshot_step"],
        block_size=size,
        current=current["name"],
        winner=winner["name"],
        at_edge=tuple(result["at_edge"]),
        variance=current[variance],
        variance_error=None if independent else current["variance_error"],
        variance_best=winner[variance],
        variance_best_error=None if independent else winner["variance_error"],
        p_best=winner["p_best"],
        **{
            key: result[key]
            for key in ("adopt", "strata", "gain", "nelbo", "nelbo_error", "blocks", "sequences")
        },
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
