"""Metrics file and console."""

import io
import json

import pytest

from bdtrain.tracking.console import Console, format_count, format_seconds
from bdtrain.tracking.jsonl import JsonlWriter


def test_every_line_is_there_at_once_and_survives_a_new_writer(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    with JsonlWriter(path) as writer:
        writer.write(1, {"train/loss": 2.5})
        assert json.loads(path.read_text())["train/loss"] == 2.5
    with JsonlWriter(path) as writer:
        writer.write(2, {"train/loss": float("nan"), "train/grad_norm": float("inf")})
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["step"], second["step"]) == (1, 2)
    assert (second["train/loss"], second["train/grad_norm"]) == ("nan", "inf")


def test_unknown_metric_is_refused(tmp_path):
    with JsonlWriter(tmp_path / "m.jsonl") as writer, pytest.raises(KeyError, match=r"train/los.*names\.py"):
        writer.write(1, {"train/los": 1.0})


@pytest.mark.parametrize(
    ("value", "text"), [(950, "950"), (12345, "12.3k"), (4_560_000, "4.56M"), (7.89e9, "7.89B"), (0.5, "0.5")]
)
def test_counts_read_short(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (185, "3m05s"), (7620, "2h07m"), (273_600, "3d04h"), (-3, "0s")],
)
def test_durations_read_short(seconds, text):
    assert format_seconds(seconds) == text


def test_progress_says_step_loss_speed_and_time_left():
    stream = io.StringIO()
    Console(stream=stream).progress(
        step=5, steps=100, loss=3.14159, lr=3e-4, tokens_per_second=12000, seconds_left=62
    )
    assert stream.getvalue() == "step   5/100  loss 3.1416  lr 3.00e-04  12k tokens/s  ETA 1m02s\n"


def test_other_ranks_are_silent():
    stream = io.StringIO()
    Console(enabled=False, stream=stream).line("hello")
    assert stream.getvalue() == ""
