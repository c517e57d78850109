"""TensorBoard's files: read by the definitions of their format, every point once whatever ends the writer."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest

from bdtrain.tracking.jsonl import MetricsLog
from bdtrain.tracking.mlflow import StoreOptions
from bdtrain.tracking.ship import SHIPPED, Shipping, open_store
from bdtrain.tracking.spool import TENSORBOARD, Point, ShipState
from bdtrain.tracking.tensorboard import TensorBoardStore, crc32c
from tests.unit.tracking.event_file import crc_bit_by_bit, read_events

OPTIONS = StoreOptions(TENSORBOARD, "tests", "tiny", "u-1")


def event_files(run: Path) -> list[Path]:
    return sorted((run / "tensorboard").glob("*tfevents*"))


def scalars(run: Path) -> dict[tuple[str, int], list[float]]:
    (path,) = event_files(run)
    found: dict[tuple[str, int], list[float]] = {}
    for event in read_events(path):
        if "scalar" in event:
            found.setdefault((event["tag"], event["step"]), []).append(event["scalar"])
    return found


def write_steps(log: MetricsLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.write(step, {"train/loss": 1.0 / step, "train/lr": 1e-3})


def shipping(run: Path, **more: object) -> Shipping:
    return Shipping(
        run, TENSORBOARD, lambda run_id: open_store(run, OPTIONS, run_id),
        attempt=None, parent_alive=lambda: False, say=lambda text: None, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def expected(last: int) -> dict[tuple[str, int], list[float]]:
    single = np.float32
    return {
        **{("train/loss", step): [float(single(1.0 / step))] for step in range(1, last + 1)},
        **{("train/lr", step): [float(single(1e-3))] for step in range(1, last + 1)},
    }


@pytest.mark.parametrize(
    ("data", "crc"),
    # The check value of CRC-32C, and the examples of RFC 3720, section B.4.
    [
        (b"123456789", 0xE3069283),
        (b"\x00" * 32, 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"", 0),
    ],
)
def test_the_checksum_is_crc32c(data: bytes, crc: int) -> None:
    assert crc32c(data) == crc == crc_bit_by_bit(data)


def test_every_point_is_in_the_file_once_with_its_time(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", 1) as log:
        log.event("start", 0)
        write_steps(log, 1, 700)
        log.write(701, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 1e300})
        log.event("end", 701)
    assert shipping(tmp_path).run() == SHIPPED
    found = scalars(tmp_path)
    last = {name: found.pop((name, 701)) for name in ("train/loss", "train/grad_norm", "train/lr")}
    assert found == expected(700)
    assert math.isnan(last["train/loss"][0]) and last["train/grad_norm"] == last["train/lr"] == [math.inf]
    events = read_events(event_files(tmp_path)[0])
    assert events[0]["version"] == "brain.Event:2"
    times = {
        record["step"]: round(record["time"], 3)
        for record in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        if "event" not in record
    }
    assert all(event["time"] == times[event["step"]] for event in events if "scalar" in event)


def test_what_a_killed_process_wrote_and_did_not_note_is_taken_back(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 1)
    log.event("start", 0)
    write_steps(log, 1, 10)
    shipping(tmp_path).run()
    noted = ShipState.load(tmp_path, TENSORBOARD)
    write_steps(log, 11, 20)
    # Killed in the middle of a frame, before the place was noted.
    killed = open_store(tmp_path, OPTIONS, noted.run_id)
    killed.log([Point("train/loss", 1.0 / step, 1000 * step, step) for step in range(11, 16)])
    (path,) = event_files(tmp_path)
    with path.open("ab") as file:
        file.write(struct.pack("<Q", 99) + b"torn")
    assert path.stat().st_size > noted.mark
    log.event("end", 20)
    shipping(tmp_path).run()
    assert event_files(tmp_path) == [path]
    assert scalars(tmp_path) == expected(20)


@pytest.mark.parametrize("damage", ["gone", "short", "state gone"])
def test_a_file_that_does_not_hold_what_was_noted_is_written_anew(tmp_path: Path, damage: str) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 1)
    log.event("start", 0)
    write_steps(log, 1, 10)
    shipping(tmp_path).run()
    (path,) = event_files(tmp_path)
    if damage == "gone":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        (tmp_path / "tensorboard_ship.json").unlink()
    write_steps(log, 11, 12)
    log.event("end", 12)
    assert shipping(tmp_path).run() == SHIPPED
    assert scalars(tmp_path) == expected(12)


def test_a_disk_that_refuses_for_a_while_costs_no_point(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", 1) as log:
        log.event("start", 0)
        write_steps(log, 1, 10)
        log.event("end", 10)
    troubles = [OSError(28, "No space left on device")] * 2

    class Full(TensorBoardStore):
        def finish(self, event: str, time_ms: int) -> None:
            if troubles:  # everything was written already, and nothing is noted
                raise troubles.pop()
            super().finish(event, time_ms)

    def open_full(run_id: str | None) -> Full:
        return Full(tmp_path, "tiny", ShipState.load(tmp_path, TENSORBOARD).mark)

    work = Shipping(
        tmp_path, TENSORBOARD, open_full,
        attempt=1, parent_alive=lambda: True, sleep=lambda seconds: None, say=lambda text: None,
        clock=iter(range(10**6)).__next__,
    )  # fmt: skip
    assert work.run() == SHIPPED
    assert scalars(tmp_path) == expected(10)


def test_texts_are_those_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: a}\nuri: http://u:hunter2@h\n")
    lines = [{"step": 3, "text": "old"}, {"step": 7, "text": "one\n\n# two"}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines) + '{"torn')
    with MetricsLog(tmp_path / "metrics.jsonl", 1) as log:
        log.event("start", 0)
        log.event("end", 9)
    shipping(tmp_path).run()
    found = {event["tag"]: event for event in read_events(event_files(tmp_path)[0]) if "text" in event}
    assert found["config"]["text"] == "    run: {name: a}\n    uri: http://***@h"
    assert json.loads(found["environment"]["text"])["packages"]
    assert set(found) == {"run", "config", "environment", "samples"}
    assert (found["samples"]["step"], found["samples"]["text"]) == (7, "    one\n    \n    # two")
