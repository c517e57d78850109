"""The curves of a run: what its metrics file says, by metric and step.

The file may hold a hundred thousand lines of the same shape, so a report line is matched instead of being
parsed; ``read_columns`` keeps the rules of ``read_metrics`` all the same.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COLUMNS = (
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "train/tokens",
    "perf/tokens_per_second",
    "perf/cpu_seconds",
    "fault/skipped_steps",
    "val/nelbo",
    "val/nelbo_noise_error",
    "val/nelbo_text_error",
    "val/ppl",
    "val/bpb",
    "val/tokens",
)
"""Metrics that a report has a place for; any other one is read as well."""


@dataclass
class Column:
    """One metric over the run: the values that count, by step.

    Attributes:
        steps: ascending.
        values: may be ``nan`` or infinite.
        times: seconds since 1970.
        attempts: which attempt said so.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)

    def extend(self, steps: list[int], values: list[float], times: list[float], attempts: list[int]) -> None:
        """Append values; they hide what an earlier attempt said of their first step."""
        while steps and self.steps and self.steps[-1] == steps[0] and self.attempts[-1] != attempts[0]:
            self._drop()
        self.steps += steps
        self.values += values
        self.times += times
        self.attempts += attempts

    def keep_until(self, step: int) -> None:
        """Forget what lies behind a step: a later attempt does it again."""
        while self.steps and self.steps[-1] > step:
            self._drop()

    def _drop(self) -> None:
        for values in (self.steps, self.values, self.times, self.attempts):
            values.pop()

    def at(self, step: float) -> float | None:
        """The value at a step, on a straight line between its neighbours; None where there is no value."""
        return interpolate(self.steps, self.values, step)

    def by_step(self) -> dict[int, float]:
        """Value by step, the last one where a step has several."""
        return dict(zip(self.steps, self.values, strict=True))


@dataclass
class Metrics:
    """The metrics file.

    Attributes:
        columns: by metric; all of ``COLUMNS``, and what else the file holds.
        events: of all attempts, in order.
        reports: lines that are no events, replaced ones included.
        first_time: of the first line, seconds since 1970; None in an empty file.
        last_time: of the last line.
        last_step: the last step that anything was said of.
        cpu_before: CPU seconds that the attempts before each one had used.
        cpu_seconds: of the attempt that is read, so far.
    """

    columns: dict[str, Column] = field(default_factory=lambda: {name: Column() for name in COLUMNS})
    events: list[dict[str, Any]] = field(default_factory=list)
    reports: int = 0
    first_time: float | None = None
    last_time: float | None = None
    last_step: int = 0
    cpu_before: dict[int, float] = field(default_factory=dict)
    cpu_seconds: float = 0.0

    def begin_attempt(self, start: Mapping[str, Any]) -> None:
        """Forget what the attempt does again."""
        used = max(self.cpu_before.values(), default=0.0) + self.cpu_seconds
        self.cpu_before[start["attempt"]], self.cpu_seconds = used, 0.0
        for column in self.columns.values():
            column.keep_until(start["step"])

    def see(self, step: int, first_time: float, last_time: float) -> None:
        """Note a stretch of lines."""
        self.first_time = first_time if self.first_time is None else self.first_time
        self.last_time, self.last_step = last_time, step

    def starts(self) -> list[dict[str, Any]]:
        """The events that open an attempt."""
        return [event for event in self.events if event["event"] == "start"]


def read_columns(path: Path) -> Metrics:
    """The numbers of a metrics file, by the rules of ``read_metrics``.

    Args:
        path: the file; one that is not there has no lines, and a torn last line is left out.
    """
    metrics, rows = Metrics(), _Rows()
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return metrics
    with file:
        for line in file:
            if rows.take(line):
                continue
            record = _parse(line) if line.endswith(b"\n") else None
            if record is None:
                continue
            if "event" not in record:
                rows.take_new(record, line)
                continue
            rows.move_to(metrics)
            if record["event"] == "start":
                metrics.begin_attempt(record)
            metrics.events.append(record)
            metrics.see(record["step"], record["time"], record["time"])
    rows.move_to(metrics)
    return metrics


class _Rows:
    """Report lines of one shape in a row, their numbers still text.

    Nearly all lines of a file have the same keys in the same order: one pattern takes the numbers out.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._pattern: re.Pattern[bytes] | None = None
        self._patterns: dict[tuple[str, ...], re.Pattern[bytes]] = {}
        self._rows: list[tuple[bytes, ...]] = []
        self._filled: list[tuple[tuple[str, ...], list[tuple[bytes, ...]]]] = []

    def take(self, line: bytes) -> bool:
        """Take a line that has the shape of the one before it; False if it has not."""
        match = self._pattern.fullmatch(line) if self._pattern is not None else None
        if match is None:
            return False
        self._rows.append(match.groups())
        return True

    def take_new(self, record: dict[str, Any], line: bytes) -> None:
        """Take a line of another shape."""
        keys = tuple(record)
        if keys not in self._patterns:
            self._patterns[keys] = _make_pattern(keys)
        self._pattern, self._rows = self._patterns[keys], []
        self._names = keys
        self._filled.append((self._names, self._rows))
        self.take(line)

    def move_to(self, metrics: Metrics) -> None:
        """Hand everything on as numbers, in order."""
        for names, rows in self._filled:
            if rows:
                _add_rows(metrics, names, rows)
        self._filled, self._pattern = [], None


def _make_pattern(keys: Sequence[str]) -> re.Pattern[bytes]:
    """What a line with these keys looks like; the values are its groups, without their quotes."""
    parts = [re.escape(json.dumps(key, ensure_ascii=False)) + ': "?([^,"}]*)"?' for key in keys]
    return re.compile((r"\{" + ", ".join(parts) + r"\}\n").encode())


def _add_rows(metrics: Metrics, names: tuple[str, ...], rows: list[tuple[bytes, ...]]) -> None:
    texts = dict(zip(names, zip(*rows, strict=True), strict=True))
    numbers = {}
    try:
        for name, column in texts.items():
            try:
                # float() reads nan, inf and -inf as they stand in the file.
                numbers[name] = list(map(float, column))
            except ValueError:
                if name in COLUMNS or name in ("step", "attempt", "time") or len(rows) > 1:
                    raise
        steps = list(map(int, numbers.pop("step")))
        attempts = list(map(int, numbers.pop("attempt")))
        times = numbers.pop("time")
        if not all(map(math.isfinite, times)):
            raise ValueError("a time is not finite")
    except (ValueError, OverflowError):
        if len(rows) > 1:  # one line of another writer: the others count
            for row in rows:
                _add_rows(metrics, names, [row])
        return
    for name, values in numbers.items():
        metrics.columns.setdefault(name, Column()).extend(steps, values, times, attempts)
    if "perf/cpu_seconds" in numbers:
        metrics.cpu_seconds = numbers["perf/cpu_seconds"][-1]
    metrics.reports += len(rows)
    metrics.see(steps[-1], times[0], times[-1])


def _parse(line: bytes) -> dict[str, Any] | None:
    """Fields of a line, None if it is not one of ours."""
    try:
        record = dict(json.loads(line))
        record["step"], record["attempt"] = int(record["step"]), int(record["attempt"])
        record["time"] = float(record["time"])
        if not math.isfinite(record["time"]):
            return None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    return record


def interpolate(knots: Sequence[float], values: Sequence[float], at: float) -> float | None:
    """The value at a place, on a straight line between its neighbours and constant outside.

    Args:
        knots: ascending.
        values: one for each.
        at: the place.
    """
    if not knots:
        return None
    right = bisect_right(knots, at)
    if right == 0:
        return values[0]
    if right == len(knots):
        return values[-1]
    low, high = knots[right - 1], knots[right]
    share = (at - low) / (high - low)
    return values[right - 1] + share * (values[right] - values[right - 1])
