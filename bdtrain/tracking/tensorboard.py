"""TensorBoard's files, written without TensorBoard: scalars, texts and pictures as framed protocol buffers.

A file is a row of frames: length, its checksum, an ``Event`` message, its checksum. The messages that a run
needs have a dozen fields between them; writing them here saves a package, and the shipping process the import
of torch. What was written and not noted is cut off before more is written: a killed process leaves no point
twice.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

from bdtrain.tracking.json_files import number, parse_json
from bdtrain.tracking.run_artifacts import make_files
from bdtrain.tracking.run_files import SAMPLES_FILE, TENSORBOARD
from bdtrain.tracking.spool import SCHEDULES, Point

FILE_VERSION = "brain.Event:2"
TEXTS = ("config.yaml", "environment.json", SAMPLES_FILE)
DT_STRING = 7
RGBA = 4
LARGEST_FLOAT = 3.4028234663852886e38
PNG_HEADER = b"\x89PNG\r\n\x1a\n"


class TensorBoardStore:
    """A run in one of TensorBoard's files, which is continued.

    Args:
        folder: of the run; the file lies in its folder ``tensorboard``.
        run_name: shown beside the configuration.
        noted: bytes of the file that were noted as written; 0 begins a new file.

    Attributes:
        run_id: name of the file.
        mark: its size.

    Raises:
        OSError: if the disk refuses: every method may be called again on a new store.
    """

    def __init__(self, folder: Path, run_name: str, noted: int) -> None:
        self._folder, self._run_name = folder, run_name
        self._place = folder / TENSORBOARD
        self._place.mkdir(exist_ok=True)
        self._begun_at = 0
        self._file = self._continue(noted) or self._begin()
        self.run_id = Path(self._file.name).name

    @property
    def mark(self) -> int:
        """Size of the file."""
        return self._file.tell()

    def begin(self, start: dict[str, Any]) -> None:
        """Note an attempt."""
        facts = {name: value for name, value in start.items() if name not in ("event", "time")}
        words = f"{self._run_name}\n\n    {json.dumps(facts)}"
        self._begun_at = start["step"]
        self._write(_text("run", words), start["step"], start["time"])

    def log(self, points: list[Point]) -> None:
        """Store points."""
        values: list[bytes] = []
        for position, point in enumerate(points):
            values.append(_scalar(point.name, point.value))
            following = points[position + 1] if position + 1 < len(points) else None
            if following is None or following[2:] != point[2:]:
                self._write(b"".join(values), point.step, point.time_ms / 1000)
                values = []

    def put(self, name: str) -> None:
        """Store what a page of TensorBoard can show: configuration, environment, last sample, pictures."""
        kind, _, rest = name.partition("/")
        if kind != SCHEDULES and name not in TEXTS:
            return
        with tempfile.TemporaryDirectory() as aside:
            for path, _ in make_files(self._folder, name, Path(aside)):
                content = path.read_bytes()
                if kind == SCHEDULES and content.startswith(PNG_HEADER):
                    step = int(rest.removeprefix("step-"))
                    self._write(_picture("sched/refit", content), step, time.time())
                elif name in TEXTS:
                    tag, words, step = _shown(name, content.decode("utf-8", errors="replace"))
                    if words.strip():  # synthetic data has no words
                        self._write(_text(tag, words), step or self._begun_at, time.time())

    def finish(self, event: str, time_ms: int) -> None:
        """Hand everything to the disk."""
        os.fsync(self._file.fileno())

    def _continue(self, noted: int) -> BinaryIO | None:
        """The newest file, cut to what was noted; None where it does not hold that much."""
        found = sorted(self._place.glob("events.out.tfevents.*.bdtrain"))
        if not noted or not found or found[-1].stat().st_size < noted:
            return None
        file = found[-1].open("r+b")
        file.truncate(noted)
        file.seek(noted)
        return file

    def _begin(self) -> BinaryIO:
        """A new file in place of those that are not known."""
        for path in self._place.glob("events.out.tfevents.*.bdtrain"):
            path.unlink()
        now = time.time()
        file = (self._place / f"events.out.tfevents.{now:017.6f}.bdtrain").open("x+b")
        file.write(frame(_double(1, now) + _bytes(3, FILE_VERSION.encode())))
        file.flush()
        return file

    def _write(self, summary: bytes, step: int, seconds: float) -> None:
        self._file.write(frame(_double(1, seconds) + _integer(2, step) + _bytes(5, summary)))
        self._file.flush()


def _shown(name: str, words: str) -> tuple[str, str, int]:
    """Tag, text and step (0: that of the attempt); the page shows indented lines as they stand."""
    step = 0
    if name == SAMPLES_FILE:
        found = [sample for line in words.splitlines() if (sample := parse_json(line))]
        sample = found[-1] if found else {}
        words, step = str(sample.get("text", "")), int(number(sample, "step") or 0)
    return name.partition(".")[0], "\n".join(f"    {line}" for line in words.splitlines()), max(step, 0)


# -- Messages: tensorflow's event.proto and summary.proto ---------------------------------------------------


def _scalar(tag: str, value: float) -> bytes:
    # Its values are single precision: what does not fit is infinite there.
    if abs(value) > LARGEST_FLOAT:
        value = float("inf") if value > 0 else float("-inf")
    return _bytes(1, _bytes(1, tag.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", value))


def _text(tag: str, words: str) -> bytes:
    shape = _bytes(2, _integer(1, 1))
    tensor = _integer(1, DT_STRING) + _bytes(2, shape) + _bytes(8, words.encode())
    metadata = _bytes(1, _bytes(1, b"text"))
    return _bytes(1, _bytes(1, tag.encode()) + _bytes(8, tensor) + _bytes(9, metadata))


def _picture(tag: str, png: bytes) -> bytes:
    width, height = struct.unpack(">II", png[16:24])
    image = _integer(1, height) + _integer(2, width) + _integer(3, RGBA) + _bytes(4, png)
    return _bytes(1, _bytes(1, tag.encode()) + _bytes(4, image))


def _double(field: int, value: float) -> bytes:
    return bytes([field << 3 | 1]) + struct.pack("<d", value)


def _integer(field: int, value: int) -> bytes:
    return bytes([field << 3]) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


# -- Frames --------------------------------------------------------------------------------------------------


def frame(data: bytes) -> bytes:
    """A message as it stands in the file: length, checksum of the length, message, checksum of it."""
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    """CRC-32C, turned and shifted, so that checksums of data that hold checksums stay good ones."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32 with Castagnoli's polynomial."""
    crc, table = 0xFFFFFFFF, _TABLE
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
