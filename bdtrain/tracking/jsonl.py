"""The metrics file: one JSON object per line, whole or not at all, readable while the run goes on.

A line is a report ``{"step", "attempt", "time", "<metric>": value, ...}`` or an event ``{"step", "attempt",
"time", "event": name, ...}``. Finite numbers are written so that they read back to the same bits; ``nan``,
``inf`` and ``-inf`` are strings, since JSON has no word for them. ``time`` is seconds since 1970.

A run that is started again appends to the same file, so some steps are in it twice. Which lines count:

* An attempt opens with the event ``start``, whose ``step`` is the one it resumes from.
* It replaces every report above it whose step is greater than that one.
* Of two attempts that report the same metric at the same step, the later one counts.

``read_metrics`` applies these rules. Events are history: none is ever replaced.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from bdtrain.tracking.names import EVENTS, find_metric, is_deterministic

OWN_FIELDS = ("step", "attempt", "time", "event")
NOT_FINITE = ("nan", "inf", "-inf")
MAX_PENDING_LINES = 10_000


class MetricsLog:
    """Appends reports and events to the metrics file of a run; one process writes it.

    What a crash tore off at the end of the file is cut when it is opened. A full disk does not raise: the
    lines wait in memory, in order, and are written as soon as there is room.

    Args:
        path: the file; its folder is made.
        attempt: number of this start of the run, from 1; greater than any in the file (``last_attempt``).

    Attributes:
        attempt: as given.
        cut_bytes: bytes of a torn end that were cut.
        problem: what keeps lines from being written, None if nothing does.

    Raises:
        ValueError: if the file has lines of this attempt or a later one.
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: Path, attempt: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.attempt = attempt
        self.problem: str | None = None
        self._pending: deque[bytes] = deque(maxlen=MAX_PENDING_LINES)
        self._started = False
        # Append mode and one system call a line: whatever ends this process leaves whole lines behind.
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self.cut_bytes = _cut_torn_end(self._file)
            before = last_attempt(path)
            if attempt <= before:
                raise ValueError(
                    f"{path} has lines of attempt {before}; attempt {attempt} cannot follow them"
                )
        except BaseException:
            os.close(self._file)
            raise

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one report.

        Args:
            step: batches taken so far.
            values: metrics by their name in ``tracking/names.py``.

        Raises:
            KeyError: for a name that is not in the list.
        """
        unknown = sorted(name for name in values if find_metric(name) is None)
        if unknown:
            raise KeyError(f"metrics {unknown} are not in bdtrain/tracking/names.py")
        self._append(step, {name: _exact(value) for name, value in values.items()})

    def event(self, name: str, step: int, **facts: Any) -> None:
        """Append one event and wait until it is on the disk.

        Args:
            name: one of ``EVENTS`` in ``tracking/names.py``; the first of an attempt is ``start``.
            step: batches taken so far; for ``start`` the step that is resumed from.
            facts: more fields: strings, numbers, None, lists and dictionaries of these.

        Raises:
            KeyError: for a name that is not in the list, or a fact with the name of a metric or of a line's
                own field.
        """
        if name not in EVENTS:
            raise KeyError(f"event {name!r} is not in bdtrain/tracking/names.py")
        taken = sorted(name for name in facts if name in OWN_FIELDS or find_metric(name) is not None)
        if taken:
            raise KeyError(f"facts {taken} of event {name!r} have names of their own meaning; choose others")
        self._started |= name == "start"
        self._append(step, {"event": name, **{key: _plain(value) for key, value in facts.items()}})
        self.sync()

    def sync(self) -> None:
        """Wait until every line is on the disk: before a checkpoint, so that no line below it can be lost."""
        self._flush()
        try:
            os.fsync(self._file)
        except OSError as error:
            self.problem = error.strerror or str(error)

    def close(self) -> None:
        """Write what waits and close the file. May be called twice."""
        if self._file >= 0:
            self._flush()
            os.close(self._file)
            self._file = -1

    def _append(self, step: int, fields: dict[str, Any]) -> None:
        if not self._started:
            raise RuntimeError(
                "the first line of an attempt is the event 'start': readers need the resumed step"
            )
        record = {"step": int(step), "attempt": self.attempt, "time": round(time.time(), 3), **fields}
        self._pending.append(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._flush()

    def _flush(self) -> None:
        """Write the lines that wait; a line that does not fit on the disk is taken back whole."""
        while self._pending:
            line = self._pending[0]
            try:
                size = os.fstat(self._file).st_size
                written = os.write(self._file, line)
                if written < len(line):
                    os.ftruncate(self._file, size)
                    raise OSError(None, "no space left for a whole line")
            except OSError as error:
                self.problem = f"{error.strerror or error}; {len(self._pending)} lines wait in memory"
                return
            self._pending.popleft()
        self.problem = None

    def __enter__(self) -> MetricsLog:
        """The log itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()


def read_lines(path: Path, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """The complete lines of a metrics file from a byte offset on; what is not a JSON object is left out.

    Args:
        path: the file; one that is not there has no lines.
        start: offset of the first byte of a line.

    Yields:
        Offset after the line, and the line's fields.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(start)
        offset = start
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            record = _parse(line)
            if record is not None:
                yield offset, _with_numbers(record)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The reports that count, in the order of the file; see the head of this file for the rules.

    Args:
        path: a metrics file; a torn last line is left out.

    Returns:
        ``{"step", "attempt", "time", "<metric>": float | int, ...}`` each.
    """
    kept: list[dict[str, Any]] = []
    for _, record in read_lines(path):
        if record.get("event") == "start":
            kept = [line for line in kept if line["step"] <= record["step"]]
        elif "event" not in record:
            kept.append(record)
    # At the resumed step itself both attempts may have a say: the later one's value hides the earlier one's.
    latest: dict[tuple[int, str], int] = {}
    for line in kept:
        for name in _metrics(line):
            latest[line["step"], name] = line["attempt"]
    for line in kept:
        for name in _metrics(line):
            if latest[line["step"], name] != line["attempt"]:
                del line[name]
    return [line for line in kept if _metrics(line)]


def read_events(path: Path) -> list[dict[str, Any]]:
    """Every event of the file, of all attempts, in order."""
    return [record for _, record in read_lines(path) if "event" in record]


def deterministic_fields(line: Mapping[str, Any]) -> dict[str, str]:
    """What must be the same, bit for bit, in an interrupted and an uninterrupted run.

    Args:
        line: a report.

    Returns:
        The step and every deterministic metric as text that differs when one bit does.
    """
    values = {name: value for name, value in line.items() if name == "step" or is_deterministic(name)}
    return {name: repr(float(value)) for name, value in sorted(values.items())}


@dataclass(frozen=True)
class AttemptSpan:
    """When an attempt was at work.

    Attributes:
        attempt: its number.
        step: the step it resumed from.
        first: time of its first line, seconds since 1970.
        last: time of its last line: it may have lived a little longer.
    """

    attempt: int
    step: int
    first: float
    last: float


def attempt_spans(path: Path) -> list[AttemptSpan]:
    """When each attempt in a metrics file was at work, in the order of the file."""
    spans: list[AttemptSpan] = []
    for _, record in read_lines(path):
        if record.get("event") == "start" or not spans:
            spans.append(AttemptSpan(record["attempt"], record["step"], record["time"], record["time"]))
        else:
            open_span = spans[-1]
            spans[-1] = AttemptSpan(
                open_span.attempt, open_span.step, open_span.first, max(open_span.last, record["time"])
            )
    return spans


def last_record(path: Path) -> dict[str, Any] | None:
    """The last complete line of a metrics file, None if there is none. Reads the end of the file only."""
    try:
        with path.open("rb") as file:
            for _, line in _lines_backwards(file.fileno()):
                record = _parse(line)
                if record is not None:
                    return _with_numbers(record)
    except FileNotFoundError:
        pass
    return None


def last_attempt(path: Path) -> int:
    """Number of the latest attempt in a metrics file, 0 if there is none."""
    record = last_record(path)
    return 0 if record is None else int(record["attempt"])


def _metrics(line: Mapping[str, Any]) -> list[str]:
    return [name for name in line if name not in OWN_FIELDS]


def _exact(value: float) -> float | int | str:
    """A number that JSON writes to be read back to the same bits; arrays of no dimension become plain."""
    if type(value) is int:
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _with_numbers(record: dict[str, Any]) -> dict[str, Any]:
    if "event" in record:
        return record
    return {
        name: float(value) if name not in OWN_FIELDS and value in NOT_FINITE else value
        for name, value in record.items()
    }


def _parse(line: bytes) -> dict[str, Any] | None:
    """Fields of a line, None if it is not one of ours."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    ours = isinstance(record, dict) and all(name in record for name in ("step", "attempt", "time"))
    return record if ours else None


def _cut_torn_end(file: int) -> int:
    """Cut what follows the last whole line: a line that a crash tore, or zeros after a power failure.

    Returns:
        How many bytes.
    """
    size = os.fstat(file).st_size
    keep = 0
    for end, line in _lines_backwards(file):
        if line.endswith(b"\n") and _parse(line) is not None:
            keep = end
            break
    if keep < size:
        os.ftruncate(file, keep)
    return size - keep


def _lines_backwards(file: int, chunk_bytes: int = 1 << 16) -> Iterator[tuple[int, bytes]]:
    """Lines from the end of a file to its beginning, with the offset after each."""
    start = os.fstat(file).st_size
    end, tail = start, b""
    while start > 0:
        size = min(chunk_bytes, start)
        start -= size
        tail = os.pread(file, size, start) + tail
        while (cut := tail.rfind(b"\n", 0, len(tail) - 1)) >= 0:
            line, tail = tail[cut + 1 :], tail[: cut + 1]
            yield end, line
            end -= len(line)
    if tail:
        yield end, tail
