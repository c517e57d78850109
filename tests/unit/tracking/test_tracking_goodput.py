"""Where the time of a run went."""

import pytest

from bdtrain.tracking.goodput import Goodput
from bdtrain.tracking.jsonl import AttemptSpan


class Clock:
    def __init__(self, now=0.0):
        self.now = now

    def __call__(self):
        return self.now


def test_every_second_belongs_to_one_activity():
    clock = Clock(100.0)
    goodput = Goodput(clock=clock, now=Clock())
    clock.now += 5  # setup
    goodput.switch("training")
    clock.now += 10
    with goodput.during("data_wait"):
        clock.now += 2
        with goodput.during("checkpoint"):
            clock.now += 3
        clock.now += 1
    clock.now += 9
    summary = goodput.summary()
    assert summary["setup_seconds"] == 5 and summary["training_seconds"] == 19
    assert summary["data_wait_seconds"] == 3 and summary["checkpoint_seconds"] == 3
    assert summary["wall_seconds"] == 30 and summary["goodput"] == 19 / 30


def test_an_activity_ends_with_its_block_even_by_an_error():
    clock = Clock()
    goodput = Goodput(clock=clock, now=Clock())
    with pytest.raises(ZeroDivisionError), goodput.during("validation"):
        clock.now += 4
        raise ZeroDivisionError
    clock.now += 1
    assert (goodput.seconds("validation"), goodput.seconds("setup")) == (4, 1)


def test_a_skipped_step_counts_as_lost():
    clock = Clock()
    goodput = Goodput(clock=clock, now=Clock())
    goodput.switch("training")
    clock.now += 10
    goodput.lose(4)
    goodput.lose(100)
    assert (goodput.seconds("training"), goodput.seconds("lost")) == (0, 10)


def test_work_after_the_checkpoint_is_lost_and_repeated_steps_are_useful_once():
    # Attempt 1 lives from 1000 to about 1030 and saves at 1020; attempt 2 begins at 1100.
    clock, now = Clock(), Clock(1000.0)
    first = Goodput(clock=clock, now=now)
    first.switch("training")
    clock.now, now.now = 20.0, 1020.0
    saved = first.to_dict()
    second_clock = Clock(500.0)
    second = Goodput(saved, spans=[AttemptSpan(1, 0, 1000.0, 1030.0)], clock=second_clock, now=Clock(1100.0))
    second.switch("training")
    second_clock.now += 30
    summary = second.summary()
    assert summary["training_seconds"] == 50
    assert summary["lost_seconds"] == 10
    assert summary["down_seconds"] == 70
    assert summary["goodput"] == 50 / 60


def test_attempts_that_left_no_checkpoint_are_lost_whole():
    spans = [AttemptSpan(1, 0, 1000.0, 1030.0), AttemptSpan(2, 0, 1050.0, 1055.0)]
    goodput = Goodput(spans=spans, clock=Clock(), now=Clock(1100.0))
    assert (goodput.seconds("lost"), goodput.seconds("down")) == (35, 65)


def test_the_clock_may_run_before_the_earlier_attempts_are_known():
    clock, now = Clock(), Clock(1100.0)
    goodput = Goodput(clock=clock, now=now)
    clock.now, now.now = 8.0, 1108.0
    goodput.add_earlier(
        {"seconds": {"setup": 2.0}, "saved_at": 1020.0}, spans=[AttemptSpan(1, 0, 1000.0, 1030.0)]
    )
    assert [goodput.seconds(name) for name in ("setup", "lost", "down")] == [10, 10, 70]


def test_a_stop_that_was_saved_loses_nothing():
    saved = {"seconds": {"training": 30.0}, "saved_at": 1030.5}
    goodput = Goodput(saved, spans=[AttemptSpan(1, 0, 1000.0, 1031.0)], clock=Clock(), now=Clock(1040.0))
    assert goodput.seconds("lost") == 0.5
    assert goodput.seconds("down") == 9


def test_an_unknown_activity_is_refused():
    goodput = Goodput(clock=Clock(), now=Clock())
    for name in ("lunch", "lost"):
        with pytest.raises(KeyError, match="choose from"):
            goodput.switch(name)
