"""The metrics file: whole lines, exact numbers, attempts that replace each other."""

import errno
import json
import math
import os
import random
import struct

import numpy as np
import pytest

from bdtrain.tracking.jsonl import (
    MetricsLog,
    attempt_spans,
    deterministic_fields,
    last_attempt,
    read_events,
    read_metrics,
)


def started(path, attempt=1, step=0):
    log = MetricsLog(path, attempt)
    log.event("start", step)
    return log


def losses(path):
    return [(line["step"], line["attempt"], line["train/loss"]) for line in read_metrics(path)]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    with started(path) as log:
        log.write(1, {"train/loss": 2.5})
        record = json.loads(path.read_text().splitlines()[-1])
    assert (record["step"], record["attempt"], record["train/loss"]) == (1, 1, 2.5)


def test_finite_numbers_read_back_to_the_same_bits(tmp_path):
    draw = random.Random(7)
    values = [struct.unpack("<d", draw.randbytes(8))[0] for _ in range(2000)]
    values = [value for value in values if math.isfinite(value)]
    values += [0.0, -0.0, 5e-324, 0.1 + 0.2, 1e308, 2**53 + 1, struct.unpack("<f", b"\x01\x02\x03\x3f")[0]]
    path = tmp_path / "m.jsonl"
    with started(path) as log:
        for step, value in enumerate(values):
            log.write(step, {"train/loss": value})
    read = [line["train/loss"] for line in read_metrics(path)]
    assert [struct.pack("<d", value) for value in read] == [struct.pack("<d", value) for value in values]
    assert isinstance(read[-2], int) and read[-2] == 2**53 + 1


def test_numbers_that_are_not_finite_are_strings_in_the_file_and_numbers_to_a_reader(tmp_path):
    path = tmp_path / "m.jsonl"
    with started(path) as log:
        log.write(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": -math.inf})
    written = json.loads(path.read_text().splitlines()[-1])
    assert [written[name] for name in ("train/loss", "train/grad_norm", "train/lr")] == ["nan", "inf", "-inf"]
    (read,) = read_metrics(path)
    assert math.isnan(read["train/loss"]) and read["train/grad_norm"] == math.inf
    assert read["train/lr"] == -math.inf


def test_values_of_other_libraries_become_plain_numbers(tmp_path):
    path = tmp_path / "m.jsonl"
    with started(path) as log:
        log.write(1, {"train/loss": np.float32(0.1), "train/tokens": np.array(7)})
    (read,) = read_metrics(path)
    assert read["train/loss"] == 13421773 / 2**27 and read["train/tokens"] == 7


def test_names_that_are_not_in_the_list_are_refused(tmp_path):
    with started(tmp_path / "m.jsonl") as log:
        with pytest.raises(KeyError, match=r"train/los.*names\.py"):
            log.write(1, {"train/los": 1.0})
        with pytest.raises(KeyError, match=r"lunch.*names\.py"):
            log.event("lunch", 1)
        with pytest.raises(KeyError, match="attempt"):
            log.event("stop", 1, attempt=3)


def test_an_attempt_opens_with_its_start_and_numbers_grow(tmp_path):
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path, 1)
    with pytest.raises(RuntimeError, match="start"):
        log.write(1, {"train/loss": 1.0})
    log.event("start", 0)
    assert last_attempt(path) == 1
    with pytest.raises(ValueError, match="attempt 1 cannot follow"):
        MetricsLog(path, 1)


def test_every_cut_of_the_last_line_leaves_the_lines_before_it(tmp_path):
    path = tmp_path / "m.jsonl"
    with started(path) as log:
        log.write(1, {"train/loss": 1.0})
        whole = path.stat().st_size
        log.write(2, {"train/loss": 2.0})
    content = path.read_bytes()
    for size in range(whole, len(content)):
        path.write_bytes(content[:size])
        assert losses(path) == [(1, 1, 1.0)]
        with MetricsLog(path, 2) as log:
            assert log.cut_bytes == size - whole
        assert path.read_bytes() == content[:whole]


def test_what_a_power_failure_leaves_at_the_end_is_cut(tmp_path):
    path = tmp_path / "m.jsonl"
    with started(path) as log:
        log.write(1, {"train/loss": 1.0})
    whole = path.stat().st_size
    for garbage in (b"\0" * 4096, b"\0" * 100_000 + b"\n", b'{"step": 2}\n', b'not json\n\n{"st'):
        path.write_bytes(path.read_bytes()[:whole] + garbage)
        with MetricsLog(path, 2) as log:
            assert log.cut_bytes == len(garbage)
        assert path.stat().st_size == whole
    path.write_bytes(b"torn")
    with MetricsLog(path, 1) as log:
        assert log.cut_bytes == 4
    assert path.read_bytes() == b""


def test_a_later_attempt_replaces_the_steps_after_the_one_it_resumed_from(tmp_path):
    path = tmp_path / "m.jsonl"
    with started(path, 1) as log:
        for step in range(1, 8):
            log.write(step, {"train/loss": step + 0.1})
    with started(path, 2, step=4) as log:
        log.write(5, {"train/loss": 5.2})
    with started(path, 3, step=2) as log:
        for step in (3, 4):
            log.write(step, {"train/loss": step + 0.3})
    # Attempt 3 went back further than attempt 2 and ended before step 5: nothing of 5 to 7 counts any more.
    assert losses(path) == [(1, 1, 1.1), (2, 1, 2.1), (3, 3, 3.3), (4, 3, 4.3)]
    assert [(event["attempt"], event["step"]) for event in read_events(path)] == [(1, 0), (2, 4), (3, 2)]


def test_at_the_resumed_step_the_later_value_of_a_metric_counts_and_the_others_stay(tmp_path):
    path = tmp_path / "m.jsonl"
    with started(path, 1) as log:
        log.write(4, {"train/loss": 4.1})
        log.write(4, {"val/nelbo": 7.1, "val/seconds": 1.0})
    with started(path, 2, step=4) as log:
        log.write(4, {"val/nelbo": 7.2})
    lines = [
        {name: value for name, value in line.items() if "/" in name or name == "attempt"}
        for line in read_metrics(path)
    ]
    assert lines == [
        {"attempt": 1, "train/loss": 4.1},
        {"attempt": 1, "val/seconds": 1.0},
        {"attempt": 2, "val/nelbo": 7.2},
    ]


def test_deterministic_fields_differ_by_one_bit_and_ignore_times():
    line = {"step": 3, "attempt": 1, "time": 5.0, "train/loss": 1.0, "perf/step_seconds": 0.1}
    later = {**line, "attempt": 2, "time": 9.0, "perf/step_seconds": 0.2}
    assert deterministic_fields(line) == deterministic_fields(later)
    moved = {**line, "train/loss": math.nextafter(1.0, 2.0)}
    assert deterministic_fields(line) != deterministic_fields(moved)
    nan = {**line, "train/loss": math.nan}
    assert deterministic_fields(nan) == deterministic_fields(dict(nan))


@pytest.mark.parametrize("torn", [True, False])
def test_a_full_disk_stops_nothing_and_loses_nothing(tmp_path, monkeypatch, torn):
    path = tmp_path / "m.jsonl"
    log = started(path)
    real = os.write

    def full(file, data):
        if torn:
            return real(file, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("bdtrain.tracking.jsonl.os.write", full)
        log.write(1, {"train/loss": 1.0})
        log.write(2, {"train/loss": 2.0})
        assert "2 lines wait" in log.problem
        assert path.read_bytes().endswith(b"\n") and losses(path) == []
    log.write(3, {"train/loss": 3.0})
    log.close()
    log.close()
    assert log.problem is None
    assert [step for step, _, _ in losses(path)] == [1, 2, 3]


def test_spans_say_when_each_attempt_was_at_work(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = [(0, 1, 10.0, "start"), (5, 1, 14.0, None), (5, 2, 100.0, "start"), (6, 2, 103.0, None)]
    with path.open("w") as file:
        for step, attempt, time, event in lines:
            record = {"step": step, "attempt": attempt, "time": time}
            file.write(json.dumps({**record, "event": event} if event else record) + "\n")
    spans = [(span.attempt, span.step, span.first, span.last) for span in attempt_spans(path)]
    assert spans == [(1, 0, 10.0, 14.0), (2, 5, 100.0, 103.0)]
