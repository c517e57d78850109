"""The re-fits of a run as its folder tells them, and the picture of variance against the clip range.

Read as files, by whoever shows them: the report, and the processes that ship. What is missing, torn or of
another kind is left out; nothing here raises for what a file holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bdtrain.tracking.json_files import number, parse_json, read_json, read_tail, section
from bdtrain.tracking.run_files import REFIT_FOLDER, REFIT_HISTORY, REFIT_REPORT, REFIT_SCHEDULE

NO_RESULT = ("late", "failed", "rejected")
"""Outcomes of a re-fit that came to nothing."""

LARGEST = 1e100
"""Numbers beyond it are not drawn."""

LOG_RATIO = 30.0
"""Values that differ by more than this factor are drawn on a logarithmic axis."""

FULL_RANGE = (0.0, 1.0)

BySize = dict[int, Mapping[str, Any]]


@dataclass(frozen=True)
class Refit:
    """A re-fit of a run's noise plan.

    Attributes:
        step: of the snapshot that was measured.
        adopt_step: at which its plan took effect, or would have; None if unknown.
        outcome: ``adopted``, ``kept``, ``late``, ``failed``, ``rejected`` or ``pending``.
        reason: in one sentence.
        version: of the schedule in force afterwards.
        before: the plan in force before, in words; empty if unknown.
        after: the plan in force afterwards.
        metrics: numbers of the search, by metric name.
        results: outcome of the search by block size; empty without a report.
        gradients: what was measured of the last layer's gradient, by block size; empty where nothing was.
    """

    step: int
    adopt_step: int | None
    outcome: str
    reason: str = ""
    version: int | None = None
    before: str = ""
    after: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    gradients: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Series:
    """Points of one kind.

    Attributes:
        name: of the kind.
        points: (x, y, standard error or None), by x.
        joined: whether a line joins them.
        edges: of bins, one more than points: a level is drawn over each bin then.
        names: of the points, where they have any.
    """

    name: str
    points: tuple[tuple[float, float, float | None], ...]
    joined: bool = True
    edges: tuple[float, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spot:
    """A point that is to be seen: ``kind`` is ``current`` or ``winner``."""

    kind: str
    name: str
    x: float
    y: float


@dataclass(frozen=True)
class Plot:
    """What one picture shows.

    Attributes:
        title: of the picture.
        x_title: of the horizontal axis.
        y_title: of the vertical one.
        series: joined by lines.
        levels: horizontal lines: (name, value, standard error or None).
        spots: marked points.
        log: whether the vertical axis is logarithmic.
        whole: whether the horizontal axis counts something.
        notes: what else a reader must know.
    """

    title: str
    x_title: str
    y_title: str
    series: tuple[Series, ...]
    levels: tuple[tuple[str, float, float | None], ...] = ()
    spots: tuple[Spot, ...] = ()
    log: bool = False
    whole: bool = False
    notes: tuple[str, ...] = ()


# -- What the folder holds -----------------------------------------------------------------------------------


def refit_name(step: int) -> str:
    """Name of the folder of a re-fit's results."""
    return f"step-{step:09d}"


def read_refits(folder: Path, events: Sequence[Mapping[str, Any]] = (), *, limit: int = 200) -> list[Refit]:
    """The re-fits of a run in the order of their snapshots.

    Args:
        folder: of the run.
        events: of its metrics file: they tell of a re-fit that is not settled.
        limit: the last ones are read, at most so many.
    """
    records = _settled(folder)
    found: list[Refit] = []
    before = ""
    for position, (step, record) in enumerate(records):
        plan = section(record, "plan")
        adopt_step, version = _whole(record, "adopt_step"), _whole(record, "version")
        after = describe_plan(plan) if plan else ""
        results, gradients = read_results(folder, step) if position >= len(records) - limit else ({}, {})
        own = _result_of(results, plan)
        found.append(
            Refit(
                step=step,
                adopt_step=adopt_step,
                outcome=str(record["outcome"]),
                reason=str(record.get("reason", "")),
                version=version,
                before=before or (describe_plan(section(own, "current")) if own else ""),
                after=after,
                metrics=section(record, "metrics"),
                results=results,
                gradients=gradients,
            )
        )
        before = after
    pending = _pending(events, {refit.step for refit in found})
    return [*found[-limit:], *pending]


def read_results(folder: Path, step: int) -> tuple[BySize, BySize]:
    """What the search of a re-fit found, and what was measured of gradients, by block size.

    Args:
        folder: of the run.
        step: of the snapshot.
    """
    report = read_json(folder / REFIT_FOLDER / refit_name(step) / REFIT_REPORT)
    return by_size(section(report, "results")), by_size(section(report, "gradients"))


def by_size(values: Mapping[str, Any]) -> BySize:
    """The objects of a report that stand under block sizes."""
    found = {
        int(size): value
        for size, value in values.items()
        if isinstance(value, dict) and size.isascii() and size.isdigit() and len(size) < 10
    }
    return dict(sorted(found.items()))


def read_refit(folder: Path, step: int) -> Refit | None:
    """One re-fit; None where the folder knows nothing of it.

    Args:
        folder: of the run.
        step: of the snapshot.
    """
    found = {refit.step: refit for refit in read_refits(folder)}.get(step)
    if found is None:
        results, gradients = read_results(folder, step)
        return Refit(step, None, "pending", results=results, gradients=gradients) if results else None
    return found


def read_files(folder: Path, step: int) -> dict[str, Any]:
    """Everything that is kept of a re-fit: how it was settled, its schedule and its report, None if missing.

    Args:
        folder: of the run.
        step: of the snapshot.
    """
    place = folder / REFIT_FOLDER / refit_name(step)
    settled = dict(_settled(folder)).get(step)
    return {
        "snapshot_step": step,
        "outcome": settled,
        "schedule": read_json(place / REFIT_SCHEDULE) or None,
        "report": read_json(place / REFIT_REPORT) or None,
    }


def gradient_metrics(report: Mapping[str, Any], block_size: int) -> dict[str, float]:
    """What a re-fit measured of the last layer's gradient, by metric name; empty where it measured nothing.

    Args:
        report: of the re-fit.
        block_size: of the run.
    """
    result = section(section(report, "results"), str(block_size))
    found = section(section(report, "gradients"), str(block_size))
    plans = {
        str(plan.get("name")): plan for plan in objects(found, "plans") if plan.get("finite") is not False
    }
    current = next((row for row in objects(result, "candidates") if row.get("is_current") is True), {})
    before, best = plans.get(str(current.get("name"))), plans.get(str(result.get("winner")))
    values = {
        "sched/gradient_variance": number(before, "gradient"),
        "sched/gradient_variance_error": number(before, "gradient_error"),
        "sched/gradient_variance_best": number(best, "gradient"),
        "sched/gradient_excess": number(found, "excess"),
        "sched/gradient_correlation": number(found, "pearson"),
        "sched/gradient_correlation_error": number(found, "pearson_error"),
        "sched/gradient_rank_correlation": number(found, "spearman"),
    }
    return {name: float(value) for name, value in values.items() if value is not None}


def describe_plan(plan: Mapping[str, Any]) -> str:
    """Range and density of a noise plan in a few words."""
    clip_range = _range(plan)
    if clip_range is None or clip_range == FULL_RANGE:
        words = "full range"
    elif clip_range == (1.0, 1.0):
        words = "full masking"
    else:
        words = f"{clip_range[0]:g} to {clip_range[1]:g}"
    if not isinstance(plan.get("density"), list):
        return words
    return "fitted counts" if words == "full range" else f"{words}, fitted counts"


def _settled(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """The last line of the history for each snapshot, by its step."""
    found: dict[int, dict[str, Any]] = {}
    for line in read_tail(folder / REFIT_FOLDER / REFIT_HISTORY):
        record = parse_json(line)
        step = _whole(record, "snapshot_step")
        if step is not None and isinstance(record.get("outcome"), str):
            found[step] = record
    return sorted(found.items())


def _pending(events: Sequence[Mapping[str, Any]], settled: set[int]) -> list[Refit]:
    begun: dict[int, Refit] = {}
    for event in events:
        if event.get("event") == "start":
            begun = {step: refit for step, refit in begun.items() if step <= event["step"]}
        step = _whole(event, "snapshot_step")
        if event.get("event") == "refit_begun" and step is not None and step not in settled:
            begun[step] = Refit(step, _whole(event, "adopt_step"), "pending")
    return [refit for _, refit in sorted(begun.items())]


def _whole(values: Mapping[str, Any], name: str) -> int | None:
    value = number(values, name)
    return int(value) if value is not None and abs(value) < 1e15 else None


def _range(plan: Mapping[str, Any]) -> tuple[float, float] | None:
    clip_range = plan.get("clip_range")
    if not isinstance(clip_range, (list, tuple)) or len(clip_range) != 2:
        return None
    values = [number({"end": end}, "end") for end in clip_range]
    if values[0] is None or values[1] is None:
        return None
    return float(values[0]), float(values[1])


def _result_of(results: Mapping[int, Mapping[str, Any]], plan: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The result for the block size of a plan, else the first."""
    size = _whole(plan, "block_size")
    if size is not None and size in results:
        return results[size]
    return next(iter(results.values()), None)


# -- What is to be drawn of it -------------------------------------------------------------------------------


def plot_variance(result: Mapping[str, Any], block_size: int) -> Plot | None:
    """Variance of each clip range against its lower bound, one series for each width.

    Plans without a range of their own (fitted counts) are horizontal lines, and so is the full range.

    Args:
        result: of a search.
        block_size: that it was made for.

    Returns:
        None where the result holds nothing to draw.
    """
    independent = result.get("strata") == "independent"
    series: dict[float, list[tuple[float, float, float | None]]] = {}
    levels: list[tuple[str, float, float | None]] = []
    spots: list[Spot] = []
    left_out = 0
    winner = result.get("winner")
    for candidate in objects(result, "candidates"):
        value = drawable(candidate, "independent_variance" if independent else "variance")
        if value is None or candidate.get("finite") is False:
            left_out += 1
            continue
        error = None if independent else drawable(candidate, "variance_error")
        name = str(candidate.get("name", "?"))
        begin, end = _range(candidate) or FULL_RANGE
        if isinstance(candidate.get("density"), list):
            levels.append((name, value, error))
        elif (begin, end) == FULL_RANGE:
            levels.append(("full range", value, error))
        else:
            series.setdefault(round(end - begin, 6), []).append((begin, value, error))
        if candidate.get("is_current") is True:
            spots.append(Spot("current", name, begin, value))
        if name == winner:
            spots.append(Spot("winner", name, begin, value))
    values = [y for points in series.values() for _, y, _ in points] + [level[1] for level in levels]
    if not values:
        return None
    notes = [f"{left_out} plans whose variance is not finite are left out"] if left_out else []
    if result.get("criterion") == "relative" or section(result, "settings").get("criterion") == "relative":
        notes.append("the search minimised the variance over the squared mean")
    if independent:
        notes.append("variance under independent draws, as the plan draws")
    return Plot(
        title=f"Variance by clip range, block size {block_size}",
        x_title="lower bound of the clip range",
        y_title="nats²/token²",
        series=tuple(
            Series(_width_name(width), tuple(sorted(points))) for width, points in sorted(series.items())
        ),
        levels=tuple(levels),
        spots=tuple(spots),
        log=min(values) > 0 and max(values) > LOG_RATIO * min(values),
        notes=tuple(notes),
    )


def _width_name(width: float) -> str:
    return f"width {width:g}" if width else "full masking"


def drawable(values: Mapping[str, Any], name: str) -> float | None:
    """A number of a report that a picture can hold; None where there is none."""
    value = number(values, name)
    return None if value is None or abs(value) > LARGEST or math.isnan(value) else float(value)


def objects(values: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The objects of a list in a report; what is none is left out."""
    found = values.get(name)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
