"""From lines of the metrics file to batches of points, each (metric, step) once, with a place to go on from.

Nothing here knows MLflow.
"""

from __future__ import annotations

import io
import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from bdtrain.tracking.jsonl import OWN_FIELDS, last_record, read_lines
from bdtrain.tracking.names import LAST_EVENTS, is_deterministic
from bdtrain.tracking.run_files import METRICS_FILE

MLFLOW, TENSORBOARD, WANDB = WRITERS = ("mlflow", "tensorboard", "wandb")
"""Where a run's metrics can go; the latter two stand for their own addresses as well."""

MAX_POINTS = 1000
"""As many as MLflow takes at once."""
CHECKED_BYTES = 256

STARTING_FILES = ("config.yaml", "environment.json", "inputs")
LAST_FILES = ("summary.json", "samples.jsonl", "report.html")
CHECKPOINTS_FILE = "checkpoints.json"
SCHEDULES = "schedule"
"""What besides numbers is shipped, by name; ``schedule/step-N`` is a re-fit, ``inputs`` are the data."""

_CREDENTIALS = re.compile(r"//[^/\s]*@")
_SECRET_QUERY = re.compile(r"(?i)([?&;](?:password|passwd|pwd|token|secret|api_?key)=)[^&;\s'\"]+")


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """A text without the credentials of the addresses in it.

    Args:
        text: anything that may hold an address or an error message.
        environment: MLflow's own secrets in it are taken out as well.
    """
    text = _SECRET_QUERY.sub(r"\1***", _CREDENTIALS.sub("//***@", text))
    for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        secret = (environment or {}).get(name)
        if secret:
            text = text.replace(secret, "***")
    return text


class RedactedStream(io.TextIOBase):
    """Passes text on without credentials: MLflow itself prints whole addresses.

    Args:
        stream: where to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Pass text on."""
        self._stream.write(redact(text, os.environ))
        return len(text)

    def flush(self) -> None:
        """Flush what it is passed to."""
        self._stream.flush()

    def writable(self) -> bool:
        """It is."""
        return True


def writer_of(store: str) -> str:
    """Which writer an address belongs to."""
    return store if store in (TENSORBOARD, WANDB) else MLFLOW


def state_file(store: str) -> str:
    """Name of the file in a run's folder that says how far it was shipped."""
    return f"{writer_of(store)}_ship.json"


def log_file(store: str) -> str:
    """Name of the file in a run's folder with what a shipping process had to say."""
    return f"{writer_of(store)}_ship.log"


def lock_file(store: str) -> str:
    """Name of the file in a run's folder that a shipping process locks."""
    return f"{writer_of(store)}_ship.lock"


@dataclass
class ShipState:
    """How far the metrics file was shipped to one store.

    Attributes:
        store: address of the store, without credentials.
        run_id: MLflow's name of the run.
        offset: bytes of the metrics file that were shipped.
        check: CRC-32 of the last bytes before the offset: says whether it is still the same file.
        finished: whether the end of the last attempt was shipped.
        problem: what keeps the rest from being shipped, None if nothing does.
        files: names of files that the store has not taken; they are tried again.
        mark: how much the store had written itself, for one that takes back what was not noted.
    """

    store: str
    run_id: str | None = None
    offset: int = 0
    check: int = 0
    finished: bool = False
    problem: str | None = None
    files: list[str] = field(default_factory=list)
    mark: int = 0

    @classmethod
    def load(cls, folder: Path, store: str) -> ShipState:
        """Read the state of a run's folder; a new one if there is none for this store."""
        known = _read_stores(folder / state_file(store)).get(redact(store))
        try:
            return cls(redact(store), **known) if known else cls(redact(store))
        except TypeError:
            return cls(redact(store))

    def save(self, folder: Path) -> None:
        """Replace the state file in one step; what it says of other stores is kept."""
        values = asdict(self)
        path = folder / state_file(self.store)
        stores = {**_read_stores(path), values.pop("store"): values}
        temporary = folder / f".tmp-{path.name}"
        temporary.write_text(json.dumps({"stores": stores}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)


def _read_stores(path: Path) -> dict[str, Any]:
    try:
        stores = json.loads(path.read_text(encoding="utf-8"))["stores"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return stores if isinstance(stores, dict) else {}


class Point(NamedTuple):
    """A value of a metric; ``time_ms`` since 1970, as written: shipped again, it is the same point."""

    name: str
    value: float
    time_ms: int
    step: int


@dataclass
class Batch:
    """Some lines of the metrics file.

    Attributes:
        end: offset after them.
        points: to be shipped.
        start: the last ``start`` event among them.
        last: the last line, None if there was none.
        full: whether lines were left that did not fit.
        files: names of the files that these lines tell of.
    """

    end: int
    points: list[Point] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    start: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    full: bool = False

    @property
    def ending(self) -> dict[str, Any] | None:
        """The event with which an attempt ended, if it is the last line."""
        return self.last if self.last is not None and self.last.get("event") in LAST_EVENTS else None


class Tail:
    """Reads a metrics file from where shipping stopped.

    A step that is repeated after a restart is left out, since MLflow would draw both: the first execution was
    shipped. Only a deterministic metric that comes out differently, which must not happen, is shipped again.

    Args:
        path: the metrics file.
        state: where to begin; an offset that does not fit the file counts as 0.
    """

    def __init__(self, path: Path, state: ShipState) -> None:
        self._path = path
        self.offset = place(path, state)
        self._earlier = self._shipped_before(self.offset)

    def read(self) -> Batch:
        """The next lines, at most ``MAX_POINTS`` points; reading again gives the same until ``advance``."""
        batch = Batch(self.offset)
        for end, record in read_lines(self._path, self.offset):
            if record.get("event") == "start":
                if batch.last is not None:
                    batch.full = True  # what it repeats is known once the lines above it are shipped
                    break
                self._earlier = self._collect(self.offset, record["step"])
                batch.start = record
            points = [] if "event" in record else self._points(record)
            if batch.points and len(batch.points) + len(points) > MAX_POINTS:
                batch.full = True
                break
            batch.points += points
            batch.files += [name for name in files_of(record) if name not in batch.files]
            batch.end, batch.last = end, record
        return batch

    def advance(self, batch: Batch) -> None:
        """Go on behind a batch that was shipped."""
        self.offset = batch.end

    def _points(self, record: dict[str, Any]) -> list[Point]:
        step, time_ms = int(record["step"]), round(record["time"] * 1000)
        earlier = self._earlier.get(step, {})
        return [
            Point(name, float(value), time_ms, step)
            for name, value in record.items()
            if name not in OWN_FIELDS and not _repeats(name, value, earlier)
        ]

    def _shipped_before(self, offset: int) -> dict[int, dict[str, float]]:
        """What the attempt in progress at an offset may repeat."""
        begin, start, previous = 0, None, 0
        for end, record in read_lines(self._path):
            if end > offset:
                break
            if record.get("event") == "start":
                begin, start = previous, record
            previous = end
        return {} if start is None else self._collect(begin, start["step"])

    def _collect(self, until: int, step: int) -> dict[int, dict[str, float]]:
        """Values of the lines before an offset, from a step on."""
        found: dict[int, dict[str, float]] = {}
        for end, record in read_lines(self._path) if until else ():
            if end > until:
                break
            if "event" not in record and record["step"] >= step:
                values = {name: value for name, value in record.items() if name not in OWN_FIELDS}
                found.setdefault(record["step"], {}).update(values)
        return found


def files_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the files that an event tells of; none for a line of metrics."""
    event = record.get("event")
    if event == "start":
        return STARTING_FILES
    if event == "checkpoint":
        return (CHECKPOINTS_FILE,)
    step = record.get("snapshot_step")
    # What is replayed after a restart was told before it.
    if event == "refit" and isinstance(step, int) and record.get("replayed") is not True:
        return (f"{SCHEDULES}/step-{step:09d}",)
    return LAST_FILES if event in LAST_EVENTS else ()


def _repeats(name: str, value: float, earlier: Mapping[str, float]) -> bool:
    if name not in earlier:
        return False
    # repr, since nan is not equal to itself.
    return not is_deterministic(name) or repr(float(value)) == repr(float(earlier[name]))


def ended(path: Path, attempt: int) -> bool:
    """Whether the last line of a metrics file is the end of an attempt, the given one or a later one."""
    last = last_record(path)
    return last is not None and last.get("event") in LAST_EVENTS and last["attempt"] >= attempt


def check_sum(path: Path, offset: int) -> int:
    """CRC-32 of the last bytes before an offset; -1 where the file is shorter."""
    if offset == 0:
        return 0
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < offset:
                return -1
            begin = max(0, offset - CHECKED_BYTES)
            return zlib.crc32(os.pread(file.fileno(), offset - begin, begin))
    except OSError:
        return -1


def place(path: Path, state: ShipState) -> int:
    """Bytes of a metrics file that were shipped; 0 if it is not the file that the state knows."""
    return state.offset if check_sum(path, state.offset) == state.check else 0


def lines_left(folder: Path, store: str) -> int:
    """Lines of a run's metrics file that were not shipped; reads only these."""
    path = folder / METRICS_FILE
    try:
        with path.open("rb") as file:
            file.seek(place(path, ShipState.load(folder, store)))
            return sum(line.endswith(b"\n") for line in file)
    except FileNotFoundError:
        return 0
