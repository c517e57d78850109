"""What a run prints, and the list of names."""

import io

import pytest

from bdtrain.tracking.console import Console, format_count, format_seconds
from bdtrain.tracking.names import EVENTS, LAST_EVENTS, METRICS, is_deterministic


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


def test_progress_shows_the_utilization_where_it_is_known():
    stream = io.StringIO()
    Console(stream=stream).progress(
        step=5, steps=9, loss=1.0, lr=3e-4, tokens_per_second=12000, seconds_left=62, mfu=0.3817
    )
    assert stream.getvalue().endswith("12k tokens/s  MFU 38.2%  ETA 1m02s\n")


def test_everything_that_was_learned_must_repeat_after_a_restart_and_no_time_must():
    for name, metric in METRICS.items():
        section = name.split("/")[0]
        assert section in ("train", "val", "perf", "fault", "ckpt", "sched")
        times = metric.unit in ("s", "tokens/s", "TFLOP/s")
        if name.startswith("sched/gradient_"):
            assert not metric.deterministic  # there only if they came before their schedule was due
        elif section in ("train", "val", "sched"):
            assert metric.deterministic is not times, name
        if times:
            assert not metric.deterministic, name
    assert is_deterministic("fault/skipped_steps") and not is_deterministic("no/such")
    assert set(EVENTS) > LAST_EVENTS


def test_other_ranks_are_silent():
    stream = io.StringIO()
    Console(enabled=False, stream=stream).line("hello")
    assert stream.getvalue() == ""


def test_reader_of_the_console_may_leave():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    console = Console(stream=Gone())
    console.line("first")
    console.line("second")
